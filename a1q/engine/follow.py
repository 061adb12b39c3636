"""What a process that doesn't lead does: the parallel stages, when the leading one says so, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.engine.artifact import Artifact
from a1q.engine.plan import Plan
from a1q.engine.stage import StageContext
from a1q.engine.world import PeerLost, World


def summons(context: StageContext) -> dict[str, Any]:
    """What process 0 tells the others of a stage that begins, as JSON values."""
    return {
        "stage": context.id,
        "seed": context.seed,
        "out": str(context.out.absolute()),
        "scratch": str(context.scratch.absolute()),
        "inputs": {name: _told(artifact) for name, artifact in context.inputs.items()},
        "data": {name: entry.digest for name, entry in context.data.items()},
    }


def follow(plan: Plan, world: World) -> None:
    """Take part in stages until process 0 is done, or gone.

    Raises:
        A1QError: if a stage failed in this process; process 0 learns of it by this one's end.
    """
    stages = {planned.id: planned for planned in plan.stages}
    while (told := _heard(world)) is not None:
        planned = stages[told["stage"]]
        context = StageContext(
            id=planned.id,
            config=planned.config,
            seed=told["seed"],
            inputs={name: _artifact(item) for name, item in told["inputs"].items()},
            out=Path(told["out"]),
            scratch=Path(told["scratch"]),
            runtime=plan.runtime,
            groups=planned.groups,
            data={name: dataclasses.replace(entry, digest=told["data"][name]) for name, entry in planned.data.items()},
            smoke=plan.smoke,
            world=world,
        )
        planned.stage.run(context)


def _heard(world: World) -> Any:
    try:
        return world.shared(None)
    except PeerLost:
        return None  # process 0 has said why it ended


def _told(artifact: Artifact | None) -> dict[str, Any] | None:
    if artifact is None:
        return None
    path = str(artifact.path.absolute())
    return {"kind": artifact.kind, "path": path, "digest": artifact.digest, "meta": dict(artifact.meta)}


def _artifact(told: Mapping[str, Any] | None) -> Artifact | None:
    if told is None:
        return None
    return Artifact(told["kind"], Path(told["path"]), told["digest"], told["meta"])
