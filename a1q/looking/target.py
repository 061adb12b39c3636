"""What a person names, of whatever kind: a model, a package, a teacher's cache, statistics, an adapter. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1q.engine.artifact import MANIFEST
from a1q.engine.rundir import read_report
from a1q.errors import MismatchError, UsageError
from a1q.models.adapter_source import CONFIG as ADAPTER
from a1q.models.locate import is_core_ml, locate_folder

KINDS = {
    "teacher.json": "teacher",
    "statistics.safetensors": "statistics",
    "rules.json": "rules",
    "report.json": "report",
    ADAPTER: "adapter",
}
"""A file that only a folder of this kind has, at its top."""


@dataclass(frozen=True)
class Target:
    """A folder and what it holds."""

    kind: str
    """`model`, `package` (of Core ML), or one of `KINDS`."""
    folder: Path


def find(name: str) -> Target:
    """What `name` means: all that `a1q.models.locate.locate_folder` takes, and RUN:ID or a folder of any kind.

    Raises:
        UsageError, MismatchError: as `locate_folder` does.
    """
    path = Path(name).expanduser()
    run, colon, stage = name.rpartition(":")
    if colon and not path.exists() and (folder := _other_artifact(run, stage)) is not None:
        path = folder
    if path.is_dir() and not (path / "config.json").is_file() and read_report(path) is None:
        kind = next((kind for file, kind in KINDS.items() if (path / file).is_file()), None)
        if kind is not None:
            return Target(kind, path)
    folder = path if path.is_dir() and path != Path(name).expanduser() else locate_folder(name)
    return Target("package" if is_core_ml(folder) else "model", folder)


def require_predicting(target: Target, name: str) -> None:
    """Refuse what gives no logits; `name` is what the user called it.

    Raises:
        UsageError: it says what it is.
    """
    if target.kind not in ("model", "package"):
        raise UsageError(f"{name} is of kind {target.kind}, which predicts nothing; expected a model or a package")


def require_whole(target: Target) -> None:
    """Refuse an artifact whose files are not what was published.

    Raises:
        MismatchError: it names the files.
    """
    odd = damaged_files(target.folder)
    if odd:
        raise MismatchError(f"{target.folder} is damaged: {', '.join(odd)} is not what was published")


def _other_artifact(run: str, stage: str) -> Path | None:
    """The folder of a stage's artifact, where it is neither model nor package."""
    for folder in (Path(run).expanduser(), Path("runs") / run):
        report = read_report(folder)
        if report is None:
            continue
        item = next((item for item in report["stages"] if item["id"] == stage), None)
        if item is None or item["kind"] in ("model", "package"):
            return None
        path = Path(item["artifact"])
        if not path.is_dir():
            raise MismatchError(f"{path}, the result of stage {stage}, is not there any more; run the recipe again")
        return path
    return None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        MismatchError: if there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MismatchError(f"{path} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise MismatchError(f"{path} holds no JSON object")
    return found


def damaged_files(folder: Path) -> list[str]:
    """Files of an artifact of the store that are not what its manifest says; empty for folders without one.

    Raises:
        MismatchError: if the manifest can't be read.
    """
    from a1q.engine.artifact import sha256_file

    if not (folder / MANIFEST).is_file():
        return []
    files = read_object(folder / MANIFEST).get("files", {})
    if not isinstance(files, dict):
        raise MismatchError(f"{folder / MANIFEST} is damaged")
    found = []
    for name, facts in files.items():
        digest = facts.get("sha256") if isinstance(facts, dict) else facts
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            found.append(name)
    return found
