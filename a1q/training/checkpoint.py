"""Checkpoints of an unfinished training loop: safetensors and JSON, written whole or not at all, checked on load.

A checkpoint at step n is two files, `step-NNNNNNNN.safetensors` and `step-NNNNNNNN.json`; the second is written last
and carries the first one's digest and its own, so a missing, cut or flipped one is always noticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.engine.artifact import sha256_bytes, sha256_file
from a1q.engine.files import disk_error, fsync_path
from a1q.errors import MismatchError, Problem, StageError

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
"""How many checkpoints stay on disk: the newest, and one to fall back to."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    """Counters and figures, JSON values."""


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Write a checkpoint durably, then remove all but the newest `KEPT`.

    Raises:
        StageError: if the disk is full or can't be written; earlier checkpoints stay as they are.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stem = f"step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / f"{stem}.safetensors"
        temporary = folder / f"{stem}.safetensors.tmp"
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary)
        digest = sha256_file(temporary)
        _publish(temporary, data)
        body = {"step": step, "sha256": digest, "identity": dict(identity), "values": dict(values)}
        note = folder / f"{stem}.json.tmp"
        note.write_bytes(_json({"body": body, "sha256": sha256_bytes(_json(body))}))
        _publish(note, folder / f"{stem}.json")
    except (OSError, SafetensorError) as error:
        reason = disk_error(error, folder) or error
        raise StageError(f"the checkpoint of step {step} was not written: {reason}") from error
    for old in _notes(folder)[KEPT:]:
        old.with_suffix(".safetensors").unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, identity: Mapping[str, Any], log: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None. A damaged one is named in the log and the one before it is tried.

    Raises:
        MismatchError: if the checkpoint was written under another `identity`; it names every field that differs.
    """
    from safetensors.torch import load_file

    for note in _notes(folder):
        data = note.with_suffix(".safetensors")
        try:
            body = _checked_body(note, data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log(f"checkpoint {note.stem} is damaged ({error}); trying the one before it")
            continue
        _require_same(body["identity"], json.loads(_json(dict(identity))), folder)
        return Checkpoint(body["step"], load_file(data), body["values"])
    return None


def _notes(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.json"), reverse=True)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()  # a held-out loss may be NaN, which canonical JSON refuses


def _publish(temporary: Path, final: Path) -> None:
    fsync_path(temporary)
    os.replace(temporary, final)
    fsync_path(final.parent)


def _checked_body(note: Path, data: Path) -> dict[str, Any]:
    document = json.loads(note.read_bytes())
    body = document["body"]
    if sha256_bytes(_json(body)) != document["sha256"]:
        raise ValueError(f"{note.name} does not match its digest")
    if sha256_file(data) != body["sha256"]:
        raise ValueError(f"{data.name} does not match its digest")
    return body


def _require_same(saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    hint = f"resume where it was started, or remove {folder} to train from the start"
    problems = [
        Problem(
            f"the checkpoint can't be resumed here: {name} was {saved.get(name)!r} and is {current.get(name)!r}",
            hint=hint,
        )
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if problems:
        raise MismatchError(problems)
