"""What an assistant said, against texts cut at hand."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from a1q.data import conversational, read_sequences
from a1q.data.bpe import CHAT_TEMPLATE, train_tokenizer
from a1q.data.chat import Chat, UnclearError
from a1q.data.sequences import load_tokenizer
from a1q.errors import MismatchError, StageError
from tests.data.text import sentence

MARKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
THOUGHTFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENING = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
PICKY = "{% if messages | length % 2 %}{{ raise_exception('in pairs') }}{% endif %}" + CHAT_TEMPLATE
TALK = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "So. Really so?"},
    {"role": "assistant", "content": "So. It is."},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chat")
    train_tokenizer((f"{sentence(number)}\n\n\n{sentence(number + 1)}" for number in range(300)), 400, 512, place)
    return place


def use(folder: Path, template: str) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))


def said(folder: Path, messages: tuple[dict[str, str], ...] = TALK) -> list[str]:
    """What is marked, run by run."""
    tokenizer, _ = load_tokenizer(folder)
    chat = Chat(folder, tokenizer)
    text = chat.example(messages)
    ids = numpy.array(tokenizer.encode(text, add_special_tokens=False).ids)
    marks = chat.said(messages, text, ids)
    assert len(marks) == len(ids)
    runs: list[list[int]] = []
    for number, mark in enumerate(marks):
        if mark and (number == 0 or not marks[number - 1]):
            runs.append([])
        if mark:
            runs[-1].append(int(ids[number]))
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKING])
def test_answers_and_the_ends_of_their_turns(folder: Path, template: str) -> None:
    use(folder, template)
    assert said(folder) == ["So.<|im_end|>", "So. It is.<|im_end|>"]
    assert said(folder, TALK[:2]) == []


def test_what_stands_before_the_last_answer_alone(folder: Path) -> None:
    use(folder, THOUGHTFUL)
    last = "<think>\n\n</think>\n\nSo. It is.<|im_end|>"
    assert said(folder) == ["So.<|im_end|>", last]
    silent = {"role": "assistant", "content": ""}
    assert said(folder, (TALK[1], silent, *TALK[1:])) == ["<|im_end|>", "So.<|im_end|>", last]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (OPENING, TALK, "writes an answer's beginning otherwise"),
        (PICKY, TALK[1:], "of a beginning of the conversation, .*in pairs"),
        (CHAT_TEMPLATE, (TALK[1], {"role": "assistant", "content": "\n\nSo."}), "inside a token"),
    ],
)
def test_what_cannot_be_told_is_said(
    folder: Path, template: str, messages: tuple[dict[str, str], ...], reason: str
) -> None:
    use(folder, template)
    with pytest.raises(UnclearError, match=reason):
        said(folder, messages)


CONTENTS = st.lists(
    st.text(st.sampled_from("aB.\n <|im_end>¿é"), max_size=12)  # also parts of what ends a turn
    | st.sampled_from([sentence(1), "<|im_end|>", "<think>"]),
    min_size=1,
    max_size=6,
)


@example(["", ">", ""], False, THOUGHTFUL)  # which also ends what ends a turn
@given(CONTENTS, st.booleans(), st.sampled_from([CHAT_TEMPLATE, THOUGHTFUL]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_one_look_over_the_tokens_finds_what_the_template_says(
    folder: Path, contents: list[str], system: bool, template: str
) -> None:
    chat = chats(folder, template, None)
    assert chat._turns is not None
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    if system:
        messages.insert(0, {"role": "system", "content": "Be short."})
    text = chat.example(messages)
    ids = numpy.array(chat._tokenizer.encode(text, add_special_tokens=False).ids)
    quick, (sure,) = chat.quickly([messages], ids, numpy.array([0, len(ids)]))
    try:
        wanted = chat._asked(messages, text, ids)
    except UnclearError:
        return  # nobody to compare with
    if sure:
        assert (quick == wanted).all()
    elif not any("<|im" in content for content in contents):
        raise AssertionError("what is simple was not found")


@functools.cache
def chats(folder: Path, template: str, thinking: bool | None) -> Chat:
    use(folder, template)
    return Chat(folder, load_tokenizer(folder)[0], thinking)


SWITCHED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""As Qwen 3 does it."""


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("length", [2, 3, 5])
def test_what_is_learned_from_begins_with_the_prompt(folder: Path, thinking: bool, length: int) -> None:
    """Token by token, and what the assistant said is all that follows."""
    chat = chats(folder, SWITCHED, thinking)
    messages = TALK[:length] if length > 2 else TALK[1:3]
    text, prompt = chat.example(messages), chat.prompt(messages[:-1])

    def tokens(item: str) -> list[int]:
        return chat._tokenizer.encode(item, add_special_tokens=False).ids

    ids = numpy.array([token for piece in chat.pieces(messages) for token in tokens(piece)])
    asked = numpy.array(tokens(prompt))
    assert (ids[: len(asked)] == asked).all()
    assert prompt.endswith("assistant\n" if thinking else "</think>\n\n")
    assert text == prompt + messages[-1]["content"] + "<|im_end|>\n"
    marks = chat.said(messages, text, ids)
    line = len(tokens("\n"))
    assert marks[len(asked) : len(ids) - line].all() and not marks[len(ids) - line :].any()
    assert marks[: len(asked)].any() == (length == 5)  # the answer before


def test_thoughts_stay_where_thinking_is_on(folder: Path) -> None:
    for last in (
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."},
        {"role": "assistant", "content": "So.", "reasoning_content": "Hm."},
    ):
        messages = (TALK[1], last)
        thoughtful, quiet = (chats(folder, SWITCHED, mode).example(messages) for mode in (True, False))
        assert thoughtful.endswith("assistant\n<think>\nHm.\n</think>\n\nSo.<|im_end|>\n")
        assert quiet.endswith("assistant\n<think>\n\n</think>\n\nSo.<|im_end|>\n") and "Hm" not in quiet


def test_prompts_are_told_apart_by_their_tokens(folder: Path) -> None:
    found = [chats(folder, SWITCHED, mode).prompts_digest() for mode in (None, True, False)]
    assert found[0] == found[1] != found[2]
    assert chats(folder, CHAT_TEMPLATE, False).prompts_digest() == chats(folder, CHAT_TEMPLATE, None).prompts_digest()


def test_a_template_that_knows_no_thinking_is_said(folder: Path) -> None:
    with pytest.raises(MismatchError, match="knows no thinking"):
        chats(folder, CHAT_TEMPLATE, True)


def test_a_conversation_that_the_template_refuses_is_no_crash(folder: Path) -> None:
    use(folder, PICKY)
    with pytest.raises(StageError, match=r"refuses a conversation of system, user, assistant, .*in pairs"):
        Chat(folder, load_tokenizer(folder)[0]).example(TALK)


def test_sequences_carry_the_marks(folder: Path, tmp_path: Path) -> None:
    """Also of conversations among which some can't be told, and of text that is none."""
    use(folder, CHAT_TEMPLATE)
    rows = [{"messages": [dict(item) for item in TALK[1:]]} | {"number": number} for number in range(40)]
    for number, row in enumerate(rows):
        row["messages"][0] = {"role": "user", "content": f"Why {number}?"}
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"source": str(path), "holdout": 0.1}
    found = read_sequences(entry, folder, "train", 16, None, 0, marks=True)
    assert found.said is not None and found.said.shape == found.tokens.shape and found.unclear == 0
    tokenizer, end = load_tokenizer(folder)
    flat, marks = found.tokens.reshape(-1), found.said.reshape(-1)
    answer = tokenizer.encode("So.<|im_end|>", add_special_tokens=False).ids
    first = numpy.flatnonzero(marks)[0]
    assert flat[first : first + len(answer)].tolist() == answer
    assert not marks[flat == end].any() and 0 < marks.mean() < 1
    assert read_sequences(entry, folder, "train", 16, None, 0).said is None

    use(folder, OPENING)
    unclear = read_sequences(entry, folder, "train", 16, None, 0, marks=True)
    assert unclear.said is None and unclear.unclear > 20 and "prompts for one" in unclear.reason


def test_what_an_entry_says_of_its_documents() -> None:
    known = [
        ({"source": "builtin:qa"}, True),
        ({"source": "builtin:prose", "format": "auto"}, False),
        ({"source": "some/set", "format": "qa"}, True),
        ({"source": "some/set", "format": "text"}, False),
        ({"source": "some/set", "column": "body"}, False),
        ({"source": "some/set"}, None),
    ]
    assert [conversational(entry) for entry, _ in known] == [answer for _, answer in known]


TEMPLATES = st.sampled_from([CHAT_TEMPLATE, THOUGHTFUL, MARKING, SWITCHED, PICKY, "{{ bos_token }}" + CHAT_TEMPLATE])


@given(CONTENTS, TEMPLATES, st.booleans(), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_the_template_writes_what_apply_chat_template_says(
    folder: Path, contents: list[str], template: str, prompt: bool, thought: bool
) -> None:
    """Whether it is asked directly or not, and refuses alike."""
    chat = chats(folder, template, None)
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    if thought:
        messages[-1]["reasoning_content"] = "Hm."
    try:
        wanted = chat._templated.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception:
        with pytest.raises(StageError, match="refuses a conversation of user"):
            chat._rendered(messages, prompt)
    else:
        assert chat._rendered(messages, prompt) == wanted
        assert template == PICKY or chat._compiled is not None


def test_without_the_compiler_of_transformers_the_text_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    use(folder, SWITCHED)
    fast = Chat(folder, load_tokenizer(folder)[0], False)
    monkeypatch.delattr(chat_template_utils, "_compile_jinja_template")
    slow = Chat(folder, load_tokenizer(folder)[0], False)
    assert fast._compiled is not None and slow._compiled is None
    monkeypatch.undo()  # apply_chat_template itself compiles with it
    assert fast.pieces(TALK) == slow.pieces(TALK) and fast.prompt(TALK[:-1]) == slow.prompt(TALK[:-1])
