"""The model behind a teacher cache: noted when the cache is written, found again to compare on the full vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from a1q.engine.artifact import MANIFEST, Artifact
from a1q.engine.files import copy_file
from a1q.errors import A1QError, MismatchError, Problem

FOLDER = "model"
"""Inside a teacher cache: the copy of a teacher that an earlier stage made and no source names."""


def note_teacher(teacher: Artifact, out: Path) -> dict[str, Any]:
    """What a teacher cache in `out` records of its teacher.

    A model with a source (the Hub, a folder, a built-in one) is found there again. One that an earlier stage made
    has none, and the store may drop it: it is copied into the cache.
    """
    manifest = teacher.path / MANIFEST
    made_here = manifest.is_file()
    if made_here:
        for name in json.loads(manifest.read_text(encoding="utf-8"))["files"]:
            target = out / FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(teacher.path / name, target)
    found = {} if made_here else teacher.meta
    return {"source": found.get("source"), "revision": found.get("revision"), "digest": teacher.digest}


def find_teacher(cache: Artifact, near: Artifact | None = None) -> Path:
    """The folder of the model behind a teacher cache, the same to the byte.

    Args:
        cache: an artifact of kind `teacher`.
        near: a model at hand that may be the one, such as the recipe's own.

    Raises:
        MismatchError: if it is gone or has changed since.
    """
    noted = cache.meta["teacher"]
    if near is not None and near.digest == noted["digest"]:
        return near.path
    if (cache.path / FOLDER).is_dir():
        return cache.path / FOLDER  # covered by the artifact's own digest
    from a1q.models.source import resolve_source

    source = f"{noted['source']}" + (f" at revision {noted['revision']}" if noted["revision"] else "")
    hint = "name the place where it is now with `teacher_model: {source: ...}`, or make the cache anew (`--force`)"
    try:
        found = resolve_source(noted["source"], noted["revision"])
    except A1QError as error:
        problem = Problem(f"the teacher behind the cache, {source}, is not found: {error}", hint=hint)
        raise MismatchError([problem]) from error
    if found.digest != noted["digest"]:
        raise MismatchError([Problem(f"the teacher behind the cache, {source}, has changed since", hint=hint)])
    return found.path


def load_teacher(cache: Artifact, near: Artifact | None, device: Any) -> Any:
    """The model behind a teacher cache, in evaluation mode, on `device`. Arguments and errors as `find_teacher`."""
    from a1q.models.checkpoint import load_model

    return load_model(find_teacher(cache, near), device=device)
