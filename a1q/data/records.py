"""Documents of a data entry: from the built-in text, a file, a folder of files, the Hub, or a mix of other entries.

A data entry is a mapping with `source` and, optionally, `format`, `column`, `holdout`, `revision`, `split`. Formats are
`text`, where the column that `column` names, or the first of `text`, `content`, `body`, is the document; those of
`a1q.data.formats`, whose conversations go through the tokenizer's chat template; and `auto`, decided by the columns of
every row. Or it has `parts`, the entries of a mix with their weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from a1q.data import builtin, questions
from a1q.data.formats import FORMATS, TEXT_COLUMNS, Messages, conversation_of, decide, missing
from a1q.data.split import place_of
from a1q.data.tables import Row, hub_rows, local_digest, local_path, rows_of_path
from a1q.engine.artifact import canonical_json, sha256_bytes
from a1q.errors import A1QError, StageError


@dataclass(frozen=True)
class Record:
    """One document: plain text, or a conversation for the tokenizer's chat template."""

    place: float
    """In [0, 1): where the split puts it."""
    text: str = ""
    messages: Messages = ()


def identify(config: Mapping[str, Any]) -> str:
    """Content digest of a data entry's source, or an empty string while that takes a download or an extraction."""
    if config.get("parts"):
        return _digest_of_parts([identify(part["entry"]) for part in config["parts"]])
    source = config["source"]
    if source in builtin.NAMES:
        digest = builtin.known_digest(_extracted(source))
        return questions.digest_of(digest) if digest and source == builtin.QUESTIONS else digest
    path = local_path(source)
    return local_digest(path) if path else ""


def look(config: Mapping[str, Any]) -> str | None:
    """The format of an entry's first document; None for a mix, or where telling takes a download.

    Raises:
        StageError: if that document can't be read, or there is none.
        MismatchError: if there is no such source.
    """
    if config.get("parts") or config.get("source") is None:
        return None
    source, kind = config["source"], config.get("format") or "auto"
    if source in builtin.NAMES:
        return "qa" if source == builtin.QUESTIONS else "text"
    path = local_path(source)
    if path is None:
        known = "text" if config.get("column") else None
        return known if kind == "auto" else kind
    for where, row in rows_of_path(path):
        if _record(config, where, row):
            return decide(row, config.get("column")) if kind == "auto" else kind
    raise _without_text(source)


def describe(config: Mapping[str, Any]) -> str:
    """What an entry is read as, for people, as far as that is known without a download."""
    if config.get("parts"):
        return "a mix of " + ", ".join(f"{part['name']} {part['weight']:g}" for part in config["parts"])
    kind = look(config)
    if kind is None:
        return "its columns say what it is read as, once it is here"
    read = "running text" if kind == "text" else f"conversations (`{kind}`)"
    asked = config.get("format") not in (None, "auto") or config["source"] in builtin.NAMES or config.get("column")
    thinking = f", thinking {config['thinking']}" if config.get("thinking") else ""
    return f"{read}{'' if asked else ', by the columns of its first row'}{thinking}"


def conversational(config: Mapping[str, Any]) -> bool | None:
    """Whether a data entry's documents are conversations, some of them for a mix; None where that can't be told yet."""
    if config.get("parts"):
        known = [conversational(part["entry"]) for part in config["parts"]]
        return True if True in known else None if None in known else False
    try:
        found = look(config)
    except A1QError:
        return None  # said when it is planned or read
    return None if found is None else found != "text"


def prepare(config: Mapping[str, Any]) -> str:
    """Make the source ready to read, here and offline from now on, and return its content digest.

    Raises:
        StageError: if a file can't be read.
        MismatchError: if there is no such source, or the Hub can't be reached.
    """
    if config.get("parts"):
        return _digest_of_parts([prepare(part["entry"]) for part in config["parts"]])
    source = config["source"]
    if source in builtin.NAMES:
        digest = builtin.extract(_extracted(source))
        return questions.digest_of(digest) if source == builtin.QUESTIONS else digest
    path = local_path(source)
    if path:
        return local_digest(path)
    sha = hashlib.sha256()
    for record in records(config):
        sha.update(canonical_json([record.text, [dict(message) for message in record.messages]]) + b"\n")
    return sha.hexdigest()


def records(config: Mapping[str, Any]) -> Iterator[Record]:
    """Every document of the entry, all splits; those of a mix part by part.

    Raises:
        StageError: for text that is not UTF-8, a line that is no JSON object, a missing column, a source without any
            text; it names the place.
        MismatchError: if there is no such source, or the Hub can't be reached.
    """
    if config.get("parts"):
        for part in config["parts"]:
            yield from records(part["entry"])
        return
    source, found = config["source"], 0
    if source == builtin.QUESTIONS:
        for document in builtin.read(builtin.PROSE):
            messages = questions.conversation(document)
            if messages:
                yield Record(document.place, messages=messages)
    elif source in builtin.NAMES:
        for document in builtin.read(source):
            yield Record(document.place, document.text)
    else:
        for row in _rows(config):
            record = _record(config, *row)
            if record:
                found += 1
                yield record
        if not found:
            raise _without_text(source)


def _without_text(source: str) -> StageError:
    return StageError(f"{source} holds no text: nothing in it is more than empty")


def _rows(config: Mapping[str, Any]) -> Iterator[Row]:
    path = local_path(config["source"])
    return rows_of_path(path) if path else hub_rows(config)


def _extracted(source: str) -> str:
    return builtin.PROSE if source == builtin.QUESTIONS else source


def _digest_of_parts(digests: list[str]) -> str:
    return sha256_bytes(canonical_json(digests)) if all(digests) else ""


def _record(config: Mapping[str, Any], where: str, row: Mapping[str, Any]) -> Record | None:
    """The row as a record; None if it is empty."""
    kind, column = config.get("format") or "auto", config.get("column")
    if kind == "auto":
        kind = decide(row, column) or ""
        if not kind:
            every = [(TEXT_COLUMNS[0],), *(need for name in FORMATS for need in FORMATS[name].columns)]
            raise missing(where, row, "`format: auto`", list(dict.fromkeys(every)))
    if kind != "text":
        messages = conversation_of(kind, where, row)
        for message in messages:
            _refuse_half_characters(where, message["content"])
        if not any(message["content"].strip() for message in messages):
            return None
        return Record(place_of(canonical_json([dict(item) for item in messages]).decode()), messages=messages)
    names = (column,) if column else TEXT_COLUMNS
    name = next((name for name in names if name in row), None)
    if name is None:
        raise missing(where, row, f"`column: {column}`" if column else "format `text`", [(item,) for item in names])
    text = row[name]
    if not isinstance(text, str):
        raise StageError(f"{where}: column {name!r} holds no text but {type(text).__name__}: {str(text)[:60]}")
    _refuse_half_characters(where, text)
    return Record(place_of(text), text) if text.strip() else None


def _refuse_half_characters(where: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no text that a tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StageError(
            f"{where}: half of a surrogate pair, {text[error.start]!a}, at character {error.start}"
        ) from None
