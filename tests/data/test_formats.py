"""Every format's example row is read, found by its columns, and a row of another is refused with what was found."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.data import conversational
from a1q.data.formats import FORMATS, conversation_of, decide
from a1q.data.records import look, records
from a1q.errors import StageError
from tests.data.test_records import write_lines

READ = {
    "alpaca": [("user", "Add.\n\n1 and 2"), ("assistant", "3")],
    "dolly": [("user", "When was it?\n\nIt was in 1969."), ("assistant", "1969")],
    "chat": [("user", "Why?"), ("assistant", "So.")],
    "sharegpt": [("user", "Why?"), ("assistant", "So.")],
    "openhermes": [("system", "Be short."), ("user", "Why?"), ("assistant", "So.")],
    "qa": [("user", "Why?"), ("assistant", "So.")],
}


def said(messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_a_format_is_read_by_name_and_by_its_columns(name: str, tmp_path) -> None:
    row = json.loads(FORMATS[name].example)
    assert said(conversation_of(name, "here", row)) == READ[name]
    source = write_lines(tmp_path / "a.jsonl", [row])
    for options in ({"format": name}, {"format": "auto"}, {}):
        (record,) = records({"source": source, **options})
        assert said(record.messages) == READ[name]
    assert look({"source": source}) == decide(row) and conversational({"source": source}) is True


def test_text_goes_before_conversations_and_a_column_before_all() -> None:
    assert decide(["instruction", "output", "text"]) == "text"
    assert decide(["messages", "body_of_it"], "body_of_it") == "text"
    assert decide(["id", "url"]) is None


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        ({"format": "alpaca"}, {"instruction": "Add.", "response": "3"}, "'instruction' and 'output', which format "
         "`alpaca` needs; the columns found are instruction, response; such rows are `format: dolly`"),
        ({"format": "chat"}, {"message": []}, r"column 'messages'.*are message; did you mean `column: message`"),
        ({"format": "sharegpt"}, {"id": 3}, r'column .conversations., .*found are id; such a row is \{"conversations"'),
        ({}, {"title": "x"}, "column 'text' or 'instruction' and 'output' or .*which `format: auto` needs"),
        ({}, {"conversations": [{"from": "alien", "value": "x"}]}, "nobody is called 'alien'.*there are system, human"),
        ({}, {"conversations": "x"}, 'not a list of messages such as {"from": "human"'),
        ({}, {"messages": [{"role": "user", "content": None}]}, "a message holds nothing"),
        ({}, {"messages": [{"role": "user", "content": 4}]}, "a message holds no text but int: 4"),
        ({}, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a message holds no text but list"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_what_was_found(options: dict, row: dict, message: str, tmp_path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(StageError, match=rf"a\.jsonl:1(:| has no) .*{message}|a\.jsonl:1: {message}"):
        list(records({"source": source, **options}))


def test_parts_of_a_message_and_its_thought_are_kept() -> None:
    parts = [{"type": "text", "text": "So"}, {"type": "text", "text": "."}]
    row = {"messages": [{"role": "assistant", "content": parts, "reasoning_content": "Hm."}]}
    assert conversation_of("chat", "here", row) == (
        {"role": "assistant", "content": "So.", "reasoning_content": "Hm."},
    )


def test_empty_conversations_are_passed_over_and_nothing_but_them_is_an_error(tmp_path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"question": " ", "answer": ""}, {"question": "", "answer": ""}])
    with pytest.raises(StageError, match=r"a\.jsonl holds no text"):
        list(records({"source": source}))


KEYS = st.text(max_size=8) | st.sampled_from(["messages", "conversations", "instruction", "output"])
VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@given(st.dictionaries(KEYS, VALUES))
def test_no_row_makes_a_format_crash(row: dict) -> None:
    for name in FORMATS:
        try:
            found = conversation_of(name, "here", row)
        except StageError:
            continue
        assert all(isinstance(message["content"], str) for message in found)
