"""What the stages that quantize say while planning: resolved modules, sizes, and what a scheme can't take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from a1q.engine.matching import summarize
from a1q.engine.stage import PlanContext
from a1q.errors import StageError
from a1q.models.view import PREPARED, QUANTIZED, ModelView, ModuleView
from a1q.quant.bits import bpw, bpw_model, module_bits
from a1q.quant.build import complete, make_scheme

WORKING_COPIES = 12
"""Buffers of the size of the largest weight, in float32, that a fit keeps at its peak."""
LOGITS = 16 << 20
"""Logits that `a1q.quant.fisher` computes at a time (64 MiB in float32): those of some positions of a batch."""


def planned_modules(
    ctx: PlanContext, path: str, wanted: Iterable[tuple[ModuleView, Mapping[str, Any], bool]]
) -> dict[str, ModuleView]:
    """The modules of one rule as they will be, by name; what can't be is one problem at `path` per cause.

    Args:
        wanted: module, its new scheme mapping, and whether a latent stays with it.
    """
    planned: dict[str, ModuleView] = {}
    refused: dict[str, list[str]] = {}
    wrong: set[str] = set()
    for module, mapping, latent in wanted:
        try:
            spec = complete(mapping)
            refusals = make_scheme(spec).check(module.shape)
        except StageError as error:
            wrong.add(str(error))
            continue
        for refusal in refusals:
            refused.setdefault(refusal, []).append(module.name)
        planned[module.name] = ModuleView(module.name, module.shape, module.kind, QUANTIZED, spec, 0, latent)
    for message in sorted(wrong):
        ctx.recipe_problem(path, message)
    for refusal, names in refused.items():
        ctx.mismatch(path, refusal, f"in {', '.join(summarize(names))}")
    return planned


def check_statistics(ctx: PlanContext, path: str = "statistics") -> None:
    """Record statistics of a model that a later `prepare` stage changed: its linears see other inputs."""
    statistics, view = ctx.views.get("statistics"), ctx.views["model"]
    if statistics is not None and list(statistics.get("prepared", ())) != list(view.config.get(PREPARED, ())):
        ctx.recipe_problem(
            path,
            "the statistics are not those of this model: `prepare` changed what its linears see",
            "put a `calibrate` after the last `prepare`",
        )


def describe(spec: Mapping[str, Any]) -> str:
    """`lut_lowrank 4 bit rank 1`: the scheme and what its size depends on."""
    return " ".join([str(spec["scheme"]), f"{spec['bits']} bit", make_scheme(spec).details]).rstrip()


def notes(view: ModelView, changed: Mapping[str, ModuleView], owners: Mapping[str, str]) -> tuple[str, ...]:
    """A line per group and scheme of the `changed` modules, and one for the whole model."""
    groups: dict[tuple[str, str], list[ModuleView]] = {}
    for name, module in changed.items():
        groups.setdefault((owners.get(name, "rest"), describe(module.scheme or {})), []).append(module)
    lines = []
    for (group, text), modules in groups.items():
        weights = sum(module.shape[0] * module.shape[1] for module in modules)
        bits = sum(map(module_bits, modules)) / weights
        lines.append(f"{group}: {len(modules)} modules -> {text}, {bits:.2f} bits per weight")
        lines.extend(f"  {name}" for name in summarize(module.name for module in modules))
    lines.append(f"quantized linears {bpw(view):.3f} bits per weight, whole model {bpw_model(view):.3f}")
    return tuple(lines)


def fit_memory(view: ModelView, changed: Mapping[str, ModuleView]) -> int:
    """Peak bytes while `changed` are fitted: the model in float32, latents beside it, one fit's buffers."""
    sizes = [module.shape[0] * module.shape[1] for module in view.modules.values()]
    latents = [module.shape[0] * module.shape[1] for module in view.modules.values() if module.latent]
    largest = max((module.shape[0] * module.shape[1] for module in changed.values()), default=0)
    return 4 * (max(view.parameters, sum(sizes)) + sum(latents) + WORKING_COPIES * largest)
