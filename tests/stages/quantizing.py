"""Plan and run the quantizing stages on a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.engine.artifact import Artifact
from a1q.engine.registry import Registry
from a1q.engine.stage import DataEntry, Group, Outcome, PlanContext, Runtime, StageContext
from a1q.models.view import ModelView, read_view
from tests.training.student import GROUPS, stage_config

HEAD = Group("lm", r"lm_head")
ALL_GROUPS = {**GROUPS, "lm": HEAD, "up": Group("up", r"model\.layers\.\d+\.mlp\.up_proj")}
MLP4 = {"scheme": "lut_lowrank", "bits": 4}


def plan(
    stage: str,
    views: Mapping[str, Any],
    options: Mapping[str, Any],
    data: Mapping[str, DataEntry] | None = None,
) -> tuple[Outcome, list[tuple[str, str, str, bool]]]:
    """The outcome and the problems: (path, message, hint, whether it's a mismatch)."""
    problems: list[tuple[str, str, str, bool]] = []
    ctx = PlanContext(
        id=stage,
        config=stage_config(stage, options),
        views=views,
        groups=ALL_GROUPS,
        data=data or {},
        report=lambda *problem: problems.append(problem),
    )
    return Registry().get("stages", stage)().plan(ctx), problems


def run(
    stage: str,
    folder: Path,
    inputs: Mapping[str, Artifact | None],
    options: Mapping[str, Any],
    data: Mapping[str, DataEntry] | None = None,
    **more: Any,
) -> tuple[Artifact, StageContext]:
    """Run a stage in a new folder of `folder`, `more` in its context; the artifact it made, and the context."""
    out = folder / f"{stage}{sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0}"
    out.mkdir(parents=True)
    ctx = StageContext(
        id=stage,
        config=stage_config(stage, options),
        seed=7,
        inputs={"model": None, "statistics": None, "teacher": None, **inputs},
        out=out,
        scratch=folder,
        runtime=Runtime(threads=1),
        groups=ALL_GROUPS,
        data=data or {},
        **more,
    )
    Registry().get("stages", stage)().run(ctx)
    kind = Registry().schema("stages", stage)["x-a1q"]["output"]
    return Artifact(kind, out, out.name * 8, ctx.meta), ctx


def view_of(artifact: Artifact) -> ModelView:
    """The view of a model artifact."""
    return read_view(artifact.path)
