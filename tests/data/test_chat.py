"""What an assistant said, against texts cut at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from a1q.data import conversational, read_sequences
from a1q.data.bpe import CHAT_TEMPLATE, train_tokenizer
from a1q.data.chat import Chat, UnclearError
from a1q.data.sequences import load_tokenizer
from a1q.errors import StageError
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
    text = chat.text(messages)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    marks = chat.said(messages, text, ids)
    assert len(marks) == len(ids)
    runs: list[list[int]] = []
    for number, mark in enumerate(marks):
        if mark and (number == 0 or not marks[number - 1]):
            runs.append([])
        if mark:
            runs[-1].append(ids[number])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKING])
def test_answers_and_the_ends_of_their_turns(folder: Path, template: str) -> None:
    use(folder, template)
    assert said(folder) == ["So.<|im_end|>", "So. It is.<|im_end|>"]
    assert said(folder, TALK[:2]) == []


def test_what_stands_before_the_last_answer_alone(folder: Path) -> None:
    use(folder, THOUGHTFUL)
    assert said(folder) == ["So.<|im_end|>", "<think>\n\n</think>\n\nSo. It is.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (OPENING, TALK, "writes an answer's beginning otherwise"),
        (PICKY, TALK[1:], "of a beginning of the conversation, .*in pairs"),
        (CHAT_TEMPLATE, (TALK[1], {"role": "assistant", "content": "\n\nSo."}), "inside a token"),
        (THOUGHTFUL, (TALK[1], {"role": "assistant", "content": ""}, *TALK), "otherwise once others follow"),
    ],
)
def test_what_cannot_be_told_is_said(
    folder: Path, template: str, messages: tuple[dict[str, str], ...], reason: str
) -> None:
    use(folder, template)
    with pytest.raises(UnclearError, match=reason):
        said(folder, messages)


def test_a_conversation_that_the_template_refuses_is_no_crash(folder: Path) -> None:
    use(folder, PICKY)
    with pytest.raises(StageError, match=r"refuses a conversation of system, user, assistant, .*in pairs"):
        Chat(folder, load_tokenizer(folder)).text(TALK)


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
