"""Rows of local files and of Hub data sets, one after the other: a file of any size is read in constant memory, but
for `.json`, which is one value."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from a1q.data import builtin
from a1q.engine.artifact import sha256_bytes
from a1q.engine.digests import content_digest, file_digest
from a1q.errors import MismatchError, Problem, StageError

Row = tuple[str, Mapping[str, Any]]
"""Its place, for messages, and its columns."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".md")
ABOUT = re.compile(r"(readme|licen[cs]e|notice)\b.*|dataset_(info|infos|dict)\.json|state\.json", re.IGNORECASE)
"""Files of a folder that tell of its data and hold none."""
PIECE = 1500
"""Characters after which a .txt or .md file is cut at the next empty line: the split works on such pieces."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LONGEST_FIELD = 1 << 30
"""Characters of a CSV field."""


def local_path(source: str) -> Path | None:
    """The file or folder that `source` means, or None if it is a Hub id.

    Raises:
        MismatchError: if it can be neither; the message names the nearest thing that exists.
    """
    if source.startswith("builtin:"):
        near = difflib.get_close_matches(source, builtin.NAMES, 1, 0.0)
        raise mismatch(f"there is no {source}", f"did you mean {near[0]}? There are {', '.join(builtin.NAMES)}")
    path = Path(source).expanduser()
    if path.exists():
        return path
    in_a_folder = "/" in source and path.parent.is_dir()
    if HUB_ID.fullmatch(source) and path.suffix not in SUFFIXES and not in_a_folder:
        return None
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], 1)
    hint = f"did you mean {folder / near[0]}?" if near else "name a file, a folder, a Hub data set or builtin:prose"
    raise mismatch(f"no file or folder {source}", hint)


def is_local(source: str | None) -> bool:
    """Whether it is a file or folder that exists."""
    return source is not None and not source.startswith("builtin:") and Path(source).expanduser().exists()


def is_hub_id(source: str) -> bool:
    """Whether `source` means a data set of the Hub.

    Raises:
        MismatchError: as `local_path`.
    """
    return source not in builtin.NAMES and local_path(source) is None


def local_digest(path: Path) -> str:
    """Digest of what is read at `path`."""
    files = _files(path)
    if path.is_file():  # the ending says how it is read
        return sha256_bytes(f"{path.suffix} {file_digest(path)}".encode())
    return content_digest(path, [item.relative_to(path).as_posix() for item in files])


def rows_of_path(path: Path) -> Iterator[Row]:
    """Every row of a file or folder; of text files, pieces as rows with a column `text`.

    Raises:
        StageError: for what is damaged; it names the place.
        MismatchError: if there is no file that can be read.
    """
    for file in _files(path):
        if file.suffix == ".jsonl":
            yield from _lines(file)
        elif file.suffix == ".json":
            yield from _json_rows(file)
        elif file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.suffix == ".csv":
            yield from _csv_rows(file)
        else:
            for piece in _pieces(_decode(file.read_bytes(), str(file))):
                yield str(file), {"text": piece}


def hub_rows(config: Mapping[str, Any]) -> Iterator[Row]:
    """Every row of a Hub data set's split.

    Raises:
        MismatchError: if it can't be loaded.
    """
    source, revision = config["source"], config.get("revision")
    import datasets

    try:
        data = datasets.load_dataset(source, split=config.get("split") or "train", revision=revision)
    except Exception as error:  # every transport below `datasets` brings its own exceptions
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise mismatch(
            f"the data set {source} can't be loaded from the Hub, nor from its cache here: {reason}",
            "check the name and the connection, or use what needs no network: source: builtin:prose",
        ) from error
    for number, row in enumerate(data):
        yield f"{source}, row {number}", row


def mismatch(message: str, hint: str) -> MismatchError:
    """One problem as an error."""
    return MismatchError([Problem(message, hint=hint)])


def _files(path: Path) -> list[Path]:
    """The data files at `path`, sorted by name.

    Raises:
        MismatchError: if there is none.
    """
    if path.is_file():
        files = [path]
    else:
        every = (item for item in path.rglob("*") if item.suffix in SUFFIXES)
        files = sorted(item for item in every if not ABOUT.fullmatch(item.name))
    odd = [item for item in files if item.suffix not in SUFFIXES]
    if odd or not files:
        raise mismatch(f"{path} holds no text that a1q reads", f"it reads {', '.join(SUFFIXES)}, in UTF-8")
    return files


def _lines(file: Path) -> Iterator[Row]:
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, 1):
            where = f"{file}:{number}"
            text = _decode(line, where).strip()
            if not text:
                continue
            row = _parsed(text, where)
            if not isinstance(row, dict):
                raise StageError(f'{where} is not a JSON object: every line must be one, such as {{"text": "..."}}')
            yield where, row


def _json_rows(file: Path) -> Iterator[Row]:
    found = _parsed(_decode(file.read_bytes(), str(file)), str(file))
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else None
    if not isinstance(found, list):
        raise StageError(f"{file} is no list of JSON objects; objects line by line belong in a .jsonl file")
    for number, row in enumerate(found, 1):
        where = f"{file}, row {number}"
        if not isinstance(row, dict):
            raise StageError(f'{where} is not a JSON object such as {{"text": "..."}}')
        yield where, row


def _csv_rows(file: Path) -> Iterator[Row]:
    number = 0

    def decoded() -> Iterator[str]:
        nonlocal number
        with open(file, "rb") as handle:
            for number, line in enumerate(handle, 1):
                yield _decode(line, f"{file}:{number}")

    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(decoded(), strict=True)
    try:
        for row in reader:
            where = f"{file}:{number}"
            if None in row or None in row.values():
                columns = ", ".join(reader.fieldnames or ())
                raise StageError(f"{where} has another number of fields than the header, which has {columns}")
            yield where, row
    except csv.Error as error:
        raise StageError(f"{file}:{number} is not CSV: {error}") from None


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise StageError(f"{file} is no whole Parquet file: {error}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StageError(f"{where} is not JSON: {error}") from None


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
