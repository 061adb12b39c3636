"""The built-in text: English that every installation already has on disk, extracted at first use.

`builtin:prose` is the docstrings and help topics of the standard library, `builtin:prose-all` adds those of every
package that a1q depends on, `builtin:qa` is questions and answers made from `builtin:prose`.

`$A1Q_HOME/text/DIGEST/documents.jsonl` holds one document per line in the order of the split;
`$A1Q_HOME/text/index-FINGERPRINT.json` says which digest this Python and these packages gave.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from a1q.data.cleaning import Novelty, clean
from a1q.data.docstrings import Docstring, dependency_closure, docstrings_of, source_files
from a1q.data.split import place_of
from a1q.engine.artifact import canonical_json, sha256_bytes, sha256_file
from a1q.engine.files import fsync_tree, home, remove_tree, write_atomic
from a1q.engine.locks import wait_lock

EXTRACTOR = 1
"""Raise it whenever the same sources give another text."""
SHORTEST, FEWEST_WORDS = 40, 6
PROSE, PROSE_ALL, QUESTIONS = "builtin:prose", "builtin:prose-all", "builtin:qa"
NAMES = (PROSE, PROSE_ALL, QUESTIONS)


@dataclass(frozen=True)
class Document:
    """One document of the built-in text."""

    place: float
    """In [0, 1): where the split puts it."""
    name: str
    kind: str
    text: str


def known_digest(source: str) -> str:
    """The text's digest if it has been extracted here before, else an empty string."""
    try:
        digest = str(json.loads(_index(source).read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return digest if _text(digest).is_file() else ""


def extract(source: str) -> str:
    """Make sure that the text is stored, whole and undamaged, and return its digest.

    Raises:
        StageError: if there are no sources to read.
    """
    digest = known_digest(source)
    if digest and sha256_file(_text(digest)) == digest:
        return digest
    with wait_lock(home() / "text" / "lock", True, lambda: 0, lambda pid: None):
        digest = known_digest(source)  # another process may have been faster
        if not digest or sha256_file(_text(digest)) != digest:
            lines = [canonical_json([item.place, item.name, item.kind, item.text]) for item in _collect(source)]
            digest = _store(b"\n".join(lines) + b"\n")
            write_atomic(_index(source), json.dumps({"source": source, "digest": digest}) + "\n")
    return digest


def read(source: str) -> Iterator[Document]:
    """The documents of `builtin:prose` or `builtin:prose-all`, in the order of the split."""
    with open(_text(extract(source)), encoding="utf-8") as handle:
        for line in handle:
            yield Document(*json.loads(line))


def _collect(source: str) -> Iterator[Document]:
    """Cleaned documents, held-out ones first, so that what is near to them never gets into train."""
    found = [
        item
        for module, path in source_files(dependencies=source == PROSE_ALL)
        for item in docstrings_of(module, path)
        if len(item.text) >= SHORTEST
    ]
    placed = sorted(((place_of(item.module), number, item) for number, item in enumerate(found)), key=lambda x: x[:2])
    novelty = Novelty()
    for place, _, item in placed:
        text = "\n\n".join(novelty.filter(clean(item.text)))
        if len(text) >= SHORTEST and len(text.split()) >= FEWEST_WORDS:
            yield Document(place, _public_name(item), item.kind, text)


def _public_name(item: Docstring) -> str:
    """`collections.Counter.__init__` and `a.b.f.<locals>` are what they are; topics lose their module."""
    return item.name.rpartition(".")[2] if item.kind == "topic" else item.name


def _store(content: bytes) -> str:
    """Write the text durably under its digest; the caller holds the lock."""
    digest = sha256_bytes(content)
    final, aside = _text(digest).parent, home() / "text" / "new"
    remove_tree(aside)  # of a killed process
    aside.mkdir(parents=True)
    (aside / "documents.jsonl").write_bytes(content)
    fsync_tree(aside)
    remove_tree(final)  # damaged, or not there
    aside.rename(final)
    return digest


def _text(digest: str) -> Path:
    return home() / "text" / digest / "documents.jsonl"


def _index(source: str) -> Path:
    return home() / "text" / f"index-{_fingerprint(source)}.json"


def _fingerprint(source: str) -> str:
    """What the text depends on, as far as can be told without reading the sources."""
    facts = [EXTRACTOR, source, sys.version, sysconfig.get_paths()["stdlib"]]
    if source == PROSE_ALL:
        facts += [[item.name, item.version] for item in dependency_closure("a1q")]
    return sha256_bytes(canonical_json(facts))[:16]
