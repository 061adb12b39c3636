"""A chat, line by line, with a model that answers by rule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from a1q.errors import MismatchError, StageError, UsageError
from a1q.generation.conversation import Conversation, load_conversation
from a1q.generation.loading import Voice
from a1q.generation.sampling import Sampling
from a1q.generation.session import HELP, Screen, Session
from a1q.generation.writers import Writer
from tests.data.test_chat import SWITCHED, use

END = 2  # <|im_end|>


class Echo(Writer):
    """Says `answer`, token by token, and keeps all that texts have in common."""

    context, vocabulary, device = 150, 512, "nowhere"

    def __init__(self, answer: list[int]):
        super().__init__()
        self.answer, self.prompt_size, self.computed = answer, 0, 0

    def begin(self, tokens):
        self.prompt_size = len(tokens)
        return super().begin(tokens)

    def _extend(self, tokens):
        self.computed += len(tokens)
        place = len(self.tokens) + len(tokens) - self.prompt_size
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.answer[place] if place < len(self.answer) else END] = 9
        return logits

    def _keep(self, count):
        return count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from a1q.data.bpe import train_tokenizer
    from tests.data.text import sentence

    place = tmp_path_factory.mktemp("session")
    train_tokenizer((sentence(number) for number in range(300)), 400, 512, place)
    use(place, SWITCHED)
    return place


@pytest.fixture
def chat(folder: Path):
    """A session that answers `So it is.`, what it showed, and what it told."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = tokenizer("So it is.", add_special_tokens=False)["input_ids"]
    voice = Voice(folder, Echo(words), tokenizer, [END])
    shown: list[tuple[str, bool]] = []
    told: list[str] = []
    screen = Screen(lambda text, thought: shown.append((text, thought)), told.append)
    session = Session(voice, screen, Conversation(), Sampling(temperature=0.0), most=20)
    return SimpleNamespace(session=session, shown=shown, told=told, voice=voice, tokenizer=tokenizer)


def said(chat) -> str:
    return "".join(text for text, _ in chat.shown)


def test_questions_are_answered_and_remembered(chat) -> None:
    assert chat.session.take("Why?") and chat.session.take("Really?")
    assert said(chat) == "So it is.\nSo it is.\n"
    roles = [(turn["role"], turn["content"]) for turn in chat.session.conversation.turns]
    assert roles == [("user", "Why?"), ("assistant", "So it is."), ("user", "Really?"), ("assistant", "So it is.")]
    assert all("tokens/s, stopped at the end of the text" in line for line in chat.told)
    assert " known" in chat.told[1]
    assert not chat.session.take("/quit")


def test_empty_lines_say_nothing(chat) -> None:
    chat.session.take("  ")
    assert not chat.shown and not chat.session.conversation.turns


def test_retry_undo_reset_and_system(chat) -> None:
    session = chat.session
    session.take("/retry")
    assert "no question" in chat.told[-1]
    session.take("Why?")
    session.take("/retry")
    assert said(chat) == "So it is.\n" * 2 and len(session.conversation.turns) == 2
    session.take("/system Be short.")
    assert session.conversation.messages[0] == {"role": "system", "content": "Be short."}
    session.take("/undo")
    assert chat.told[-1] == "taken back: Why?" and not session.conversation.turns
    session.take("/undo")
    assert "nothing to take back" in chat.told[-1]
    session.take("Why?")
    session.take("/reset")
    assert session.conversation.messages == [{"role": "system", "content": "Be short."}]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/retri", "did you mean /retry?"),
        ("/", "/help lists them"),
        ("/set temprature 3", "did you mean temperature?"),
        ("/set temperature hot", "takes a number, not 'hot'"),
        ("/set temperature -1", "between 0 and 100, not -1"),
        ("/set top_p nan", "between"),
        ("/set seed 9223372036854775808", "between 0 and 9223372036854775807, not 9223372036854775808"),
        ("/set max_tokens 1.5", "takes a number"),
        ("/thinking maybe", "on, off or default"),
        ("/save", "/save FILE.json"),
        ("/save nowhere/at/all.json", "can't be written"),
        ("/load", "/load FILE.json"),
        ("/load nowhere.json", "no conversation: .*No such file"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(chat, line: str, told: str, tmp_path, monkeypatch) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    before = vars(chat.session).copy()
    assert chat.session.take(line)
    assert re.search(told, chat.told[-1]) and vars(chat.session) == before


def test_settings(chat) -> None:
    for line in ("/set temperature 0.5", "/set top-k=3", "/set max_tokens 2", "/set repetition_penalty 1.1"):
        chat.session.take(line)
    assert chat.session.sampling == Sampling(0.5, 3, 0.95, 1.1) and chat.session.most == 2
    chat.session.take("/set seed 12345678901")
    chat.session.take("/set")
    assert "temperature 0.5  top_k 3" in chat.told[-1] and chat.told[-1].endswith("max_tokens 2  seed 12345678901")
    chat.session.take("Why?")
    assert "stopped at --max-tokens" in chat.told[-1]


def test_every_command_is_explained_and_there(chat) -> None:
    chat.session.take("/help")
    assert all(any(usage in line for line in chat.told) for usage, _ in HELP.values())
    assert all(hasattr(chat.session, f"_do_{name}") for name in HELP if name != "quit")


def test_a_conversation_is_kept_in_a_file_and_is_a_row_of_a_chat_set(chat, tmp_path: Path) -> None:
    from a1q.data.records import records

    file = tmp_path / "talk.json"
    chat.session.take("/system Be short.")
    chat.session.take("Why?")
    chat.session.take(f"/save {file}")
    kept = chat.session.conversation.messages
    chat.session.take("/reset")
    chat.session.take("/system")
    chat.session.take(f"/load {file}")
    assert chat.session.conversation.messages == kept
    (tmp_path / "set.jsonl").write_text(json.dumps(json.loads(file.read_text())) + "\n")
    assert [dict(item) for item in next(records({"source": str(tmp_path / "set.jsonl")})).messages] == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"messages": 3}',
        '{"messages": [{"role": "x", "content": ""}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}',
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "\xff",
    ],
)
def test_files_that_are_no_conversation(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"a\.json is no conversation"):
        load_conversation(tmp_path / "a.json")


def test_what_is_no_conversation_is_not_written_over(chat, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    chat.session.take("Why?")
    chat.session.take(f"/save {file}")
    assert "notes.txt is no conversation" in chat.told[-1] and "stays as it is" in chat.told[-1]
    assert file.read_text() == "mine"
    for _ in range(2):  # a conversation may be saved again
        chat.session.take(f"/save {tmp_path / 'talk.json'}")
        assert "2 messages in" in chat.told[-1]


def test_a_full_context_forgets_the_oldest_turns_and_says_so(chat) -> None:
    chat.session.conversation.system = "Be short."
    for number in range(12):
        chat.session.take(f"Case {number}?")
    forgotten = [line for line in chat.told if "are forgotten" in line]
    assert forgotten and "the context is full: the first 2 messages" in forgotten[0]
    turns = chat.session.conversation.turns
    assert turns[0]["role"] == "user" and turns[-2]["content"] == "Case 11?" and len(turns) < 24
    assert len(chat.voice.writer.tokens) <= chat.voice.writer.context
    before = list(turns)
    chat.session.take("Why " * 200)
    assert "the context of 150 must hold an answer of 20 too" in chat.told[-1]
    assert chat.session.conversation.turns[-1] == before[-1]


def test_thoughts_are_shown_as_such_and_not_repeated(chat) -> None:
    text = "<think>\nHm.\n</think>\n\nSo."
    chat.voice.writer.answer = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    chat.session.most = 60
    chat.session.take("/thinking on")
    chat.session.take("Why?")
    assert "".join(part for part, thought in chat.shown if thought) == "\nHm.\n"
    assert chat.session.conversation.turns[-1]["content"] == "So."
    chat.session.take("/thinking off")
    assert chat.session.chat.prompt(chat.session.conversation.messages).endswith("</think>\n\n")


def stop(chat, written: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Let the writer fail once it has read so many tokens of its own answer."""
    plain = chat.voice.writer._extend

    def stopped(tokens):
        if len(chat.voice.writer.tokens) >= chat.voice.writer.prompt_size + written:
            raise error("the writer failed")
        return plain(tokens)

    chat.voice.writer._extend = stopped


def test_ctrl_c_stops_the_answer_alone(chat) -> None:
    stop(chat, 2)
    assert chat.session.take("Why?")
    assert "stopped at Ctrl-C" in chat.told[-1]
    answer = chat.session.conversation.turns[-1]
    assert answer["role"] == "assistant" and answer["content"] and "So it is.".startswith(answer["content"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, StageError])
def test_a_question_without_an_answer_is_taken_back(chat, error: type[BaseException]) -> None:
    chat.session.take("Why?")
    before = list(chat.session.conversation.turns)
    stop(chat, -1000, error)
    for line in ("Really?", "/retry"):
        assert chat.session.take(line)
        assert ("the question is taken back" if error is KeyboardInterrupt else "the writer failed") in chat.told[-1]
        assert chat.session.conversation.turns == before


def test_ctrl_c_before_an_answer_is_begun(chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.session.chat, "prompt", interrupted)
    assert chat.session.take("Why?")
    assert chat.told == ["stopped at Ctrl-C"] and not chat.session.conversation.turns
    chat.session.interruptible = False
    with pytest.raises(KeyboardInterrupt):
        chat.session.take("Why?")


def test_a_thought_that_does_not_end_is_no_answer(chat) -> None:
    chat.voice.writer.answer = chat.tokenizer("<think>\nHm, so it", add_special_tokens=False)["input_ids"]
    chat.session.most = len(chat.voice.writer.answer)
    chat.session.take("Why?")
    assert chat.session.conversation.turns[-1] == {"role": "assistant", "content": ""}
    assert "stopped at --max-tokens" in chat.told[-1]


def test_what_is_quoted_is_no_command_and_exit_leaves_too(chat) -> None:
    assert chat.session.take("/quit", quoted=True) and said(chat) == "So it is.\n"
    assert chat.session.conversation.turns[0]["content"] == "/quit"
    assert not chat.session.take("/exit") and not chat.session.take("/quit ")


def test_what_ends_answers_by_the_template_ends_them_whatever_the_settings_say(chat) -> None:
    voice = dataclasses.replace(chat.voice, ends=[0])
    assert "<|im_end|> ends answers by the chat template" in voice.doubt(chat.session.chat)
    assert not chat.voice.doubt(chat.session.chat)
    session = Session(voice, chat.session.screen, Conversation(), Sampling(temperature=0.0), most=20)
    session.take("Why?")
    assert said(chat) == "So it is.\n" and "stopped at the end of the text" in chat.told[-1]


def test_without_a_template_there_is_a_way(chat, tmp_path: Path) -> None:
    chat.tokenizer.chat_template = None
    with pytest.raises(MismatchError, match=r"no chat template\n.*a1q generate"):
        chat.voice.chat(None)


def test_what_ends_a_turn_ends_an_answer_whatever_the_model_says_of_texts(chat) -> None:
    """Settings of a model that was never told of its chat template name the end of texts alone."""
    chat.voice.ends[:] = [0]
    chat.session.take("Why?")
    assert said(chat) == "So it is.\n" and "stopped at the end of the text" in chat.told[-1]


def test_saving_replaces_conversations_and_nothing_else(chat, tmp_path: Path) -> None:
    chat.session.take("Why?")
    for _ in range(2):
        chat.session.take(f"/save {tmp_path / 'talk.json'}")
        assert "2 messages in" in chat.told[-1]
    other = tmp_path / "thesis.txt"
    other.write_text("years of work")
    chat.session.take(f"/save {other}")
    assert "stays as it is" in chat.told[-1] and other.read_text() == "years of work"
