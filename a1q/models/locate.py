"""Which folder a person means: a model's source, an exported folder, or a run and one of its stages. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.engine.rundir import known_runs, read_report
from a1q.errors import MismatchError, Problem, UsageError
from a1q.models.source import resolve_source


def locate_model(name: str) -> Path:
    """The model folder that `name` means; see `locate_folder`.

    Raises:
        UsageError, MismatchError: as `locate_folder` does.
        MismatchError: if it is a folder of Core ML packages.
    """
    folder = locate_folder(name)
    if is_core_ml(folder):
        hint = "take the model it was exported from: a run folder, or RUN:STAGE_ID"
        raise MismatchError([Problem(f"{folder} holds a Core ML package, not the model it was made of", hint=hint)])
    return folder


def locate_folder(name: str) -> Path:
    """The folder that `name` means: a model, or what was exported of one.

    Args:
        name: a model source (`builtin:pico`, a folder, a Hub id), an `.mlpackage`, a run folder or the name of one
            below `runs/` (its last model), or `RUN:ID` (the model or exported folder of one stage).

    Raises:
        UsageError: if the run has no such stage, or the stage made no model; the message names the nearest.
        MismatchError: if there is no such model, or it is not on this machine any more.
    """
    path = Path(name).expanduser()
    run, colon, stage_id = name.rpartition(":")
    if colon and run != "builtin" and not path.is_dir():
        folder = _run_folder(run)
        if folder is None:
            raise UsageError(f"there is no run {run!r}{_near_run(run)}")
        return _of_run(folder, stage_id)
    folder = _run_folder(name)
    if folder is not None:
        return _of_run(folder, None)
    if is_core_ml(path):
        return path.parent if path.suffix == ".mlpackage" else path
    try:
        return resolve_source(name).path
    except MismatchError as error:
        raise MismatchError(
            [Problem(item.message, hint=item.hint + _near_run(name)) for item in error.problems]
        ) from None


def is_core_ml(path: Path) -> bool:
    """Whether this is a Core ML package or an exported folder of some, whole or not."""
    if path.suffix == ".mlpackage" or any(path.glob("*.mlpackage")):
        return True
    return (path / "meta.json").is_file() and not any(path.glob("*.safetensors"))


def _run_folder(name: str) -> Path | None:
    """The run folder called `name`, here or below `runs/`."""
    candidates = (Path(name).expanduser(), Path("runs") / name)
    return next((folder for folder in candidates if read_report(folder) is not None), None)


def _near_run(name: str) -> str:
    """The nearest run folder as the end of a message, or nothing."""
    found = [*known_runs(), *(path.parent for path in Path("runs").glob("*/report.json"))]
    near = difflib.get_close_matches(Path(name).name, [folder.name for folder in found], 1)
    return f"; did you mean the run {next(str(folder) for folder in found if folder.name == near[0])}?" if near else ""


def _of_run(folder: Path, stage_id: str | None) -> Path:
    """The folder of one stage's model or package; without `stage_id`, of the run's last model."""
    stages: dict[str, Mapping[str, Any]] = {item["id"]: item for item in (read_report(folder) or {})["stages"]}
    usable = [name for name, item in stages.items() if item["kind"] in ("model", "package")]
    if stage_id is None:
        models = [name for name in usable if stages[name]["kind"] == "model"]
        if not models:
            raise UsageError(f"run {folder} has made no model yet; its stages: {', '.join(stages) or 'none'}")
        stage_id = models[-1]
    if stage_id not in usable:
        near = difflib.get_close_matches(stage_id, usable, 1)
        what = f"made a {stages[stage_id]['kind']}, not a model" if stage_id in stages else "is not in that run"
        hint = f"did you mean {folder}:{near[0]}?" if near else f"models there: {', '.join(usable) or 'none'}"
        raise UsageError(f"stage {stage_id!r} of {folder} {what}; {hint}")
    found = (
        folder / "export" / stage_id if stages[stage_id]["kind"] == "package" else Path(stages[stage_id]["artifact"])
    )
    if not found.is_dir():
        hint = "the command that made the run makes it again"
        raise MismatchError([Problem(f"{found}, the result of stage {stage_id}, is not there any more", hint=hint)])
    return found
