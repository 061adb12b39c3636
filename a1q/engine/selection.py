"""Which stages of a plan a command runs: `--from`, `--until`, `--only`, and whatever those need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from a1q.engine.plan import Plan, PlannedStage
from a1q.errors import UsageError


@dataclass(frozen=True)
class Selection:
    """The stages to go through, in order, and those the user asked for by name."""

    stages: tuple[PlannedStage, ...]
    asked: frozenset[str]
    """Ids the options name; the others are there because these need them, and are hits as a rule."""


def select(plan: Plan, start: str | None = None, until: str | None = None, only: Sequence[str] = ()) -> Selection:
    """Choose stages `start` to `until` in list order, or those in `only`, plus every stage they need.

    Raises:
        UsageError: if there is no such stage, if the range is empty, or if `only` meets a range.
    """
    ids = [stage.id for stage in plan.stages]
    for option, name in (("--from", start), ("--until", until), *(("--only", item) for item in only)):
        if name is not None and name not in ids:
            raise UsageError(f"{option} {name}: there is no such stage; this recipe has {', '.join(ids)}")
    if only and (start or until):
        raise UsageError("--only can't be combined with --from or --until")
    if start and until and ids.index(start) > ids.index(until):
        raise UsageError(f"--from {start} comes after --until {until}")
    first = ids.index(start) if start else 0
    last = ids.index(until) if until else len(ids) - 1
    asked = set(only) or set(ids[first : last + 1])
    needed = set(asked)
    for stage in reversed(plan.stages):
        if stage.id in needed:
            needed.update(item for item in stage.inputs.values() if isinstance(item, str))
    return Selection(tuple(stage for stage in plan.stages if stage.id in needed), frozenset(asked))
