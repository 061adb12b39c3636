"""Forms of a quantized linear as an option of stages: one function, computed in one product or rank by rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from a1q.engine.matching import summarize
from a1q.engine.stage import PlanContext
from a1q.models.view import DENSE, ModuleView
from a1q.quant.build import make_scheme


def check_form(ctx: PlanContext, form: str, modules: Mapping[str, ModuleView]) -> dict[str, ModuleView]:
    """The quantized linears among `modules` that will compute in `form`; those that can't are a problem at `form`.

    Embeddings are looked up, and heads tied to them stay dense.
    """
    if form == "dense":
        return {}
    linears = {name: item for name, item in modules.items() if item.state != DENSE and item.kind == "linear"}
    if not linears:
        ctx.recipe_problem("form", f"no linear here is quantized, and `{form}` is a form of those", "leave `form` out")
    without = [name for name, item in linears.items() if form not in make_scheme(item.scheme or {}).forms]
    if without:
        schemes = " and ".join(sorted({str((linears[name].scheme or {})["scheme"]) for name in without}))
        message = f"{schemes} has no {form} form: {', '.join(summarize(without))}"
        ctx.recipe_problem("form", message, "schemes with a low-rank scale have it, such as lut_lowrank")
    return linears


def form_bytes(form: str, modules: Iterable[ModuleView], tokens: int, trains: bool) -> int:
    """Bytes (fp32) by which `form` exceeds the dense one: what every rank takes and gives, of all linears where they
    train, else of the largest; rank by rank, one of them at a time."""
    sizes = [sum(module.shape) * int((module.scheme or {}).get("rank", 1)) for module in modules]
    if not sizes or form == "dense" or (form == "factored" and not trains):
        return 0
    return 4 * tokens * (sum(sizes) if trains else max(sizes))


def form_note(form: str, modules: Mapping[str, ModuleView]) -> list[str]:
    """What a plan says of a form that is not the dense one."""
    ranks = sorted({int((module.scheme or {}).get("rank", 1)) for module in modules.values()})
    if not ranks:
        return []
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return [f"{form}: {span} products where the dense form has one, in {len(modules)} linears"]


def set_form(form: str, modules: Iterable[Any]) -> None:
    """Let the linears among quantized modules compute in `form`."""
    for module in modules:
        if module.kind == "linear":
            module.form = form
