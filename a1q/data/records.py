"""Documents of a data entry: from the built-in text, a file, a folder of files, or the Hub.

A data entry is a mapping with `source` and, optionally, `format`, `column`, `holdout`, `revision`, `split`. Formats:

- `text`: the column that `column` names, or the first of `text`, `content`, `body`, is the document;
- `qa`: the columns `instruction` and `output`, `question` and `answer` or `prompt` and `response` (with an optional
  `input`), or `messages`, a list of `{"role", "content"}`: they go through the tokenizer's chat template;
- `auto`: `text` if there is such a column, else `qa`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1q.data import builtin, questions
from a1q.data.split import place_of
from a1q.engine.artifact import canonical_json, sha256_bytes
from a1q.engine.digests import content_digest, file_digest
from a1q.errors import MismatchError, Problem, StageError

SUFFIXES = (".jsonl", ".parquet", ".txt", ".md")
PIECE = 1500
"""Characters after which a .txt or .md file is cut at the next empty line: the split works on such pieces."""
TEXT_COLUMNS = ("text", "content", "body")
PAIRS = (("instruction", "output"), ("question", "answer"), ("prompt", "response"))
MESSAGES = "messages"
WANTED = {"qa": (*PAIRS, (MESSAGES,)), "auto": (("text",), *PAIRS, (MESSAGES,))}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Record:
    """One document: plain text, or a conversation for the tokenizer's chat template."""

    place: float
    """In [0, 1): where the split puts it."""
    text: str = ""
    messages: Messages = ()


def identify(config: Mapping[str, Any]) -> str:
    """Content digest of a data entry's source, or an empty string while that takes a download or an extraction."""
    source = config["source"]
    if source in builtin.NAMES:
        digest = builtin.known_digest(_extracted(source))
        return questions.digest_of(digest) if digest and source == builtin.QUESTIONS else digest
    path = _local_path(source)
    return _local_digest(path) if path else ""


def conversational(config: Mapping[str, Any]) -> bool | None:
    """Whether a data entry's documents are conversations, as far as the entry itself says; None where it doesn't."""
    if config["source"] in builtin.NAMES:
        return config["source"] == builtin.QUESTIONS
    kind = config.get("format") or "auto"
    if kind == "auto":
        return False if config.get("column") else None
    return kind == "qa"


def prepare(config: Mapping[str, Any]) -> str:
    """Make the source ready to read, here and offline from now on, and return its content digest.

    Raises:
        StageError: if a file can't be read.
        MismatchError: if there is no such source, or the Hub can't be reached.
    """
    source = config["source"]
    if source in builtin.NAMES:
        digest = builtin.extract(_extracted(source))
        return questions.digest_of(digest) if source == builtin.QUESTIONS else digest
    path = _local_path(source)
    if path:
        return _local_digest(path)
    content = [[record.text, [dict(message) for message in record.messages]] for record in records(config)]
    return sha256_bytes(canonical_json(content))


def records(config: Mapping[str, Any]) -> Iterator[Record]:
    """Every document of the entry, all splits.

    Raises:
        StageError: for text that is not UTF-8, a line that is no JSON object, a missing column; it names the place.
        MismatchError: if there is no such source, or the Hub can't be reached.
    """
    source = config["source"]
    if source == builtin.QUESTIONS:
        for document in builtin.read(builtin.PROSE):
            messages = questions.conversation(document)
            if messages:
                yield Record(document.place, messages=messages)
    elif source in builtin.NAMES:
        for document in builtin.read(source):
            yield Record(document.place, document.text)
    else:
        path = _local_path(source)
        for where, row in _rows_of_path(path) if path else _hub_rows(config):
            record = _record(config, where, row)
            if record:
                yield record


def _extracted(source: str) -> str:
    return builtin.PROSE if source == builtin.QUESTIONS else source


def _local_path(source: str) -> Path | None:
    """The file or folder that `source` means, or None if it is a Hub id.

    Raises:
        MismatchError: if it can be neither; the message names the nearest thing that exists.
    """
    if source.startswith("builtin:"):
        near = difflib.get_close_matches(source, builtin.NAMES, 1, 0.0)
        raise _mismatch(f"there is no {source}", f"did you mean {near[0]}? There are {', '.join(builtin.NAMES)}")
    path = Path(source).expanduser()
    if path.exists():
        return path
    in_a_folder = "/" in source and path.parent.is_dir()
    if HUB_ID.fullmatch(source) and path.suffix not in SUFFIXES and not in_a_folder:
        return None
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], 1)
    hint = f"did you mean {folder / near[0]}?" if near else "name a file, a folder, a Hub data set or builtin:prose"
    raise _mismatch(f"no file or folder {source}", hint)


def _files(path: Path) -> list[Path]:
    """The data files at `path`, sorted by name.

    Raises:
        MismatchError: if there is none.
    """
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.suffix in SUFFIXES)
    odd = [item for item in files if item.suffix not in SUFFIXES]
    if odd or not files:
        raise _mismatch(f"{path} holds no text that a1q reads", f"it reads {', '.join(SUFFIXES)}, in UTF-8")
    return files


def _local_digest(path: Path) -> str:
    files = _files(path)
    if path.is_file():  # the ending says how it is read
        return sha256_bytes(f"{path.suffix} {file_digest(path)}".encode())
    return content_digest(path, [item.relative_to(path).as_posix() for item in files])


def _rows_of_path(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for messages, row) of every document of a file or folder."""
    for file in _files(path):
        if file.suffix == ".jsonl":
            yield from _json_rows(file)
        elif file.suffix == ".parquet":
            yield from _parquet_rows(file)
        else:
            for piece in _pieces(_decode(file.read_bytes(), str(file))):
                yield str(file), {"text": piece}


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, 1):
            where = f"{file}:{number}"
            text = _decode(line, where).strip()
            if not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise StageError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise StageError(f'{where} is not a JSON object: every line must be one, such as {{"text": "..."}}')
            yield where, row


def _parquet_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise StageError(f"{file} is no whole Parquet file: {error}") from None


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StageError(f"{where} is not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None


def _pieces(text: str) -> Iterator[str]:
    piece: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        piece.append(paragraph)
        if sum(map(len, piece)) >= PIECE:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def _hub_rows(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    source, revision = config["source"], config.get("revision")
    import datasets

    try:
        data = datasets.load_dataset(source, split=config.get("split") or "train", revision=revision)
    except Exception as error:  # every transport below `datasets` brings its own exceptions
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _mismatch(
            f"the data set {source} can't be loaded from the Hub, nor from its cache here: {reason}",
            "check the name and the connection, or use what needs no network: source: builtin:prose",
        ) from error
    for number, row in enumerate(data):
        yield f"{source}, row {number}", row


def _record(config: Mapping[str, Any], where: str, row: Mapping[str, Any]) -> Record | None:
    """The row as a record; None if it is empty."""
    kind, column = config.get("format") or "auto", config.get("column")
    pair = next((pair for pair in PAIRS if set(pair) <= set(row)), None)
    if kind == "qa" or (kind == "auto" and column is None and not set(TEXT_COLUMNS) & set(row)):
        if pair:
            messages = _pair(row, *pair)
        elif MESSAGES in row:
            messages = _messages(where, row[MESSAGES])
        else:
            known = WANTED[kind]
            wanted = " or ".join(" and ".join(map(repr, names)) for names in known)
            raise _no_column(where, row, wanted, *(known[0] if kind == "auto" else ()))
        for message in messages:
            _refuse_half_characters(where, message["content"])
        return Record(place_of(canonical_json([dict(item) for item in messages]).decode()), messages=messages)
    names = (column,) if column else TEXT_COLUMNS
    name = next((name for name in names if name in row), None)
    if name is None:
        raise _no_column(where, row, " or ".join(map(repr, names)), *names)
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


def _pair(row: Mapping[str, Any], question: str, answer: str) -> Messages:
    """A question, with Alpaca's optional input below it, and its answer."""
    asked = "\n\n".join(str(part) for part in (row[question], row.get("input")) if part)
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": str(row[answer])})


def _messages(where: str, value: Any) -> Messages:
    good = isinstance(value, Sequence) and not isinstance(value, str)
    if not good or not all(isinstance(item, Mapping) and {"role", "content"} <= set(item) for item in value):
        raise StageError(f'{where}: not a list of messages such as {{"role": "user", "content": "..."}}')
    return tuple({"role": str(item["role"]), "content": str(item["content"])} for item in value)


def _no_column(where: str, row: Mapping[str, Any], wanted: str, *names: str) -> StageError:
    found = [str(name) for name in row]
    near = [match for name in names for match in difflib.get_close_matches(name, found, 1)]
    hint = f"; did you mean `column: {near[0]}`?" if near else ""
    return StageError(f"{where} has no column {wanted}; the columns found are {', '.join(found) or 'none'}{hint}")


def _mismatch(message: str, hint: str) -> MismatchError:
    return MismatchError([Problem(message, hint=hint)])
