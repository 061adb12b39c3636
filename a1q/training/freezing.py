"""Parts of a set that stand still while the rest of it trains: magnitudes, once they hold fp16-exact numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from a1q.engine.matching import summarize
from a1q.engine.stage import PlanContext
from a1q.models.view import ModuleView
from a1q.quant.build import make_scheme

OVERLAPS = {"magnitudes": ("scales", "magnitudes")}
"""Set that can be frozen -> the sets in `trainable` that would train its parameters."""


def check_freeze(
    ctx: PlanContext, freeze: Collection[str], trainable: Collection[str], targets: Mapping[str, ModuleView]
) -> None:
    """Record sets that are frozen and trained at once, that no module has, or that were never snapped."""
    for name in freeze:
        if name in trainable:
            message = f"{name} can't train and be frozen"
            ctx.recipe_problem("freeze", message, f"take {name} out of `freeze` or out of `trainable`")
            continue
        having = {key: item for key, item in targets.items() if name in make_scheme(item.scheme or {}).trainable}
        if not having:
            ctx.recipe_problem("freeze", f"these modules' schemes have no {name}", "leave `freeze` out")
        loose = [key for key, item in having.items() if name not in item.snapped_sets]
        if loose:
            message = f"{name} of {len(loose)} modules were never snapped: {', '.join(summarize(loose))}"
            ctx.recipe_problem("freeze", message, f"put `snap: {{only: [{name}]}}` right before this stage")


def still_snapped(sets: Collection[str], trainable: Collection[str], freeze: Collection[str]) -> tuple[str, ...]:
    """Those of a module's snapped `sets` whose numbers training leaves alone."""
    return tuple(name for name in sets if name in freeze or not set(OVERLAPS[name]) & set(trainable))
