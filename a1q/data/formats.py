"""What a row of a data set means: running text, or a conversation in one of the shapes that chat sets come in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from a1q.errors import StageError

TEXT_COLUMNS = ("text", "content", "body")
PAIRS = (("instruction", "output"), ("question", "answer"), ("prompt", "response"))
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks, by the name that ShareGPT and its kin use."""

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Format:
    """How the rows of a kind of chat set become conversations."""

    columns: tuple[tuple[str, ...], ...]
    """Sets of columns of which a row needs one."""
    example: str
    """A row, as JSON."""
    read: Callable[[str, Mapping[str, Any]], Messages]
    """(place for messages, row) -> its conversation."""


def _pair(row: Mapping[str, Any], question: str, answer: str, beside: str) -> Messages:
    asked = "\n\n".join(str(part) for part in (row[question], row.get(beside)) if part)
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": str(row[answer])})


def _alpaca(where: str, row: Mapping[str, Any]) -> Messages:
    return _pair(row, "instruction", "output", "input")


def _dolly(where: str, row: Mapping[str, Any]) -> Messages:
    return _pair(row, "instruction", "response", "context")


def _qa(where: str, row: Mapping[str, Any]) -> Messages:
    pair = next((pair for pair in PAIRS if set(pair) <= set(row)), None)
    return _pair(row, *pair, "input") if pair else _chat(where, row)


def _chat(where: str, row: Mapping[str, Any]) -> Messages:
    value = row["messages"]
    _require_list(where, value, ("role", "content"), '{"role": "user", "content": "..."}')
    found = []
    for item in value:
        message = {"role": str(item["role"]), "content": _content(where, item["content"])}
        if isinstance(item.get("reasoning_content"), str):
            message["reasoning_content"] = item["reasoning_content"]
        found.append(message)
    return tuple(found)


def _sharegpt(where: str, row: Mapping[str, Any]) -> Messages:
    value = row["conversations"]
    _require_list(where, value, ("from", "value"), '{"from": "human", "value": "..."}')
    found = [{"role": "system", "content": row["system_prompt"]}] if row.get("system_prompt") else []
    for item in value:
        role = ROLES.get(str(item["from"]).lower())
        if role is None:
            known = ", ".join(ROLES)
            raise StageError(f"{where}: nobody is called {item['from']!r} in such sets; there are {known}")
        found.append({"role": role, "content": _content(where, item["value"])})
    return tuple(found)


FORMATS = {
    "alpaca": Format(
        (("instruction", "output"),), '{"instruction": "Add.", "input": "1 and 2", "output": "3"}', _alpaca
    ),
    "dolly": Format(
        (("instruction", "response"),),
        '{"instruction": "When was it?", "context": "It was in 1969.", "response": "1969"}',
        _dolly,
    ),
    "chat": Format(
        (("messages",),),
        '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}',
        _chat,
    ),
    "sharegpt": Format(
        (("conversations",),),
        '{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}',
        _sharegpt,
    ),
    "openhermes": Format(
        (("conversations",),),
        '{"system_prompt": "Be short.", "conversations": [{"from": "human", "value": "Why?"}, '
        '{"from": "gpt", "value": "So."}]}',
        _sharegpt,
    ),
    "qa": Format((*PAIRS, ("messages",)), '{"question": "Why?", "answer": "So."}', _qa),
}
"""By name; `text`, running text, is none of them."""
AUTOMATIC = {name: FORMATS[name].columns for name in ("alpaca", "dolly", "qa", "chat", "sharegpt")} | {"qa": PAIRS}
"""What `auto` looks for, in this order, in a row without a column of text; messages are `chat`, though `qa` takes
them."""


def decide(columns: Sequence[str] | Mapping[str, Any], column: str | None = None) -> str | None:
    """The format that `auto` takes for a row with these columns; None if none fits."""
    names = set(columns)
    if column is not None or names & set(TEXT_COLUMNS):
        return "text"
    return next((name for name, columns in AUTOMATIC.items() if any(set(need) <= names for need in columns)), None)


def conversation_of(name: str, where: str, row: Mapping[str, Any]) -> Messages:
    """The conversation in a row of format `name`.

    Args:
        where: place of the row, for messages.

    Raises:
        StageError: if a column is missing or holds something else; it names those there are and what is needed.
    """
    form = FORMATS[name]
    if not any(set(need) <= set(row) for need in form.columns):
        raise missing(where, row, f"format `{name}`", form.columns, form.example)
    return form.read(where, row)


def missing(
    where: str, row: Mapping[str, Any], what: str, columns: Sequence[Sequence[str]], example: str = ""
) -> StageError:
    """What is said of a row without the columns that `what` needs, one set of `columns`."""
    found = [str(name) for name in row]
    wanted = " or ".join(" and ".join(map(repr, need)) for need in columns)
    first = columns[0] if columns else ()
    near = [match for name in first if name not in row for match in difflib.get_close_matches(name, found, 1)]
    hint = f"; did you mean `column: {near[0]}`?" if near and len(first) == 1 else ""
    fitting = decide(found)
    if not hint and fitting:
        hint = f"; such rows are `format: {fitting}`"
    shown = f"; such a row is {example}" if example and not hint else ""
    return StageError(
        f"{where} has no column {wanted}, which {what} needs; the columns found are {', '.join(found) or 'none'}"
        f"{hint}{shown}"
    )


def _require_list(where: str, value: Any, keys: Sequence[str], example: str) -> None:
    good = isinstance(value, Sequence) and not isinstance(value, str)
    if not good or not all(isinstance(item, Mapping) and set(keys) <= set(item) for item in value):
        raise StageError(f"{where}: not a list of messages such as {example}")


def _content(where: str, value: Any) -> str:
    """A message's text, also where it is a list of parts of which each is text."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    kind = "nothing" if value is None else f"no text but {type(value).__name__}"
    raise StageError(f"{where}: a message holds {kind}: {str(value)[:60]}")
