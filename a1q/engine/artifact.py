"""An artifact: a folder of files with a manifest that names its kind and the digest of every file.

`artifact.json`::

    {"format": 1, "kind": "model", "meta": {...},
     "files": {"model.safetensors": {"size": 123, "sha256": "..."}}}

The artifact's digest is the sha256 of that manifest as canonical JSON: content, not path or time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "artifact.json"
RECORD = "entry.json"
"""In the store, beside the manifest: stage, type, seconds, metrics, digest, created, key parts."""
PROGRESS = "progress.jsonl"
"""In the store, beside the manifest: the figures the stage reported while it ran."""
BESIDE = frozenset({MANIFEST, RECORD, PROGRESS})
"""Files at the top of an artifact's folder that are no part of its content or digest."""
FORMAT = 1


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A published artifact, or the recipe's source model seen as one."""

    kind: str
    """`model`, `teacher`, `statistics`, `rules`, `report`, `package`, or a plug-in's own."""
    path: Path
    """The folder. Read only: it may be the store itself or a user's model folder."""
    digest: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    digest_now: Callable[[], str] | None = field(default=None, compare=False, repr=False)
    """For a folder outside the store, which somebody may replace while a run is going: computes its digest anew."""


def manifest_of(kind: str, folder: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the files now in `folder` (recursively, what stands in `BESIDE` excluded)."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in BESIDE:
            files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    return {"format": FORMAT, "kind": kind, "meta": dict(meta), "files": files}


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The artifact's digest: sha256 of the manifest as canonical JSON."""
    return sha256_bytes(canonical_json(manifest))
