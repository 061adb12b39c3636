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
BATCH = 4
"""Sequences at a time through a decoder layer while layers are fitted in order, and in a step of a reconstruction."""
SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Linears that take one input together, in the families of decoders there are."""
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


def order_memory(ctx: PlanContext, view: ModelView, changed: Mapping[str, ModuleView]) -> int:
    """Peak bytes beside `fit_memory` while layers are fitted in order (`a1q.training.blockwise`); 0 where they aren't.

    `ctx.config` has `sequential` and `reconstruct`.
    """
    statistics = ctx.views.get("statistics")
    if statistics is None or not ctx.config.sequential:
        return 0
    trains = ctx.config.reconstruct is not None
    hidden = view.config.get("hidden_size", 0)
    states = statistics["tokens"] * hidden * (3 if trains else 1)  # inputs; inputs and outputs of the layer as it was
    matrices = [sum(columns**2 for columns in layer.values()) for layer in input_matrices(changed.values()).values()]
    layers: dict[str, list[ModuleView]] = {}
    for module in changed.values():
        layers.setdefault(_layer_of(module.name), []).append(module)
    widths = max((sum(sum(module.shape) for module in layer) for layer in layers.values()), default=0)
    weights = max((sum(module.shape[0] * module.shape[1] for module in layer) for layer in layers.values()), default=0)
    # what linears take and give and half as much again on the way back; latents, gradients and two moments of Adam
    training = (BATCH * statistics["length"] * widths * 5 // 2 + 4 * weights) * trains
    return 4 * (states + 4 * max(matrices, default=0) + training)


def input_matrices(modules: Iterable[ModuleView]) -> dict[str, dict[tuple[str, str], int]]:
    """Decoder layer -> (module, input) -> in, of every E[x xᵀ] of `modules`."""
    found: dict[str, dict[tuple[str, str], int]] = {}
    for module in modules:
        owner, _, leaf = module.name.rpartition(".")
        found.setdefault(_layer_of(module.name), {})[owner, SHARED.get(leaf, leaf)] = module.shape[1]
    return found


def _layer_of(module: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`."""
    return module.rpartition(".")[0].rpartition(".")[0]
