"""Digests of files outside the store, remembered by path, size and time so that a gigabyte is read once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from a1q.engine.artifact import canonical_json, sha256_bytes, sha256_file
from a1q.engine.files import home, write_atomic

REMEMBERED_FROM = 1 << 20
"""Bytes; a smaller file is read faster than its record."""


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's content."""
    path = path.resolve()
    status = path.stat()
    if status.st_size < REMEMBERED_FROM:
        return sha256_file(path)
    facts = [str(path), status.st_size, status.st_mtime_ns]
    record = home() / "digests" / sha256_bytes(canonical_json(facts))
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["file"] == facts:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = sha256_file(path)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps({"file": facts, "sha256": digest}) + "\n")
    except OSError:
        pass  # a full or read-only disk costs the next run some time, nothing else
    return digest


def content_digest(folder: Path, names: Iterable[str]) -> str:
    """Digest of some files of a folder: of their names and contents, wherever the folder lies."""
    files = {name: file_digest(folder / name) for name in sorted(names)}
    return sha256_bytes(canonical_json({"files": files}))
