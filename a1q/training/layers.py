"""Which modules train in the turn of which decoder layer: `train: {layerwise: ...}`, as planning and running see it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.matching import summarize
from a1q.engine.stage import PlanContext
from a1q.errors import StageError
from a1q.models.view import ModelView, ModuleView
from a1q.training.checkpoint import KEPT
from a1q.training.parameters import NORMS
from a1q.training.planning import trained_count, weight_count

if TYPE_CHECKING:
    from a1q.quant.module import QuantModule


@dataclass(frozen=True)
class LayerwiseConfig:
    """Options of `layerwise`; see schemas/stages/train.json."""

    layers: tuple[int, int] | None
    backtrack: float | None


@dataclass(frozen=True)
class Turn:
    """One decoder layer while it trains."""

    index: int
    name: str
    """The layer's module name."""
    modules: Mapping[str, QuantModule]
    """Those of it that train, by module name."""


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a module is in, the first number in its name; None outside of them."""
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else int(found[1])


def turns_of(model: Any, chosen: Mapping[str, QuantModule], config: Any) -> list[Turn]:
    """The turns of a model's layers, in order: those in `layerwise.layers` with something of `chosen` that trains.

    Args:
        config: that of a stage with `layerwise` and `trainable`.

    Raises:
        StageError: if there is none.
    """
    from a1q.models.blocks import decoder_layers

    turns = []
    for index, name in enumerate(decoder_layers(model)[0]):
        modules = {key: module for key, module in chosen.items() if key.startswith(f"{name}.")}
        trains = {"weights", NORMS} & set(config.trainable) or any(
            module.trainable(kind) for module in modules.values() for kind in config.trainable
        )
        if modules and trains and _within(index, config.layerwise.layers):
            turns.append(Turn(index, name, modules))
    if not turns:
        raise StageError("there is nothing to train in these layers")
    return turns


def planned_turns(
    ctx: PlanContext, view: ModelView, targets: Mapping[str, ModuleView]
) -> dict[int, dict[str, ModuleView]]:
    """The modules of every turn by their layer's number, as `turns_of` will have them; problems go to `ctx`."""
    config = ctx.config
    layers = config.layerwise.layers
    placed = {name: layer_of(name) for name in targets}
    outside = [name for name, layer in placed.items() if layer is None]
    if outside and (config.groups is not None or len(outside) == len(placed)):
        message = f"{', '.join(summarize(outside))}: in no decoder layer, and `layerwise` trains one after the other"
        remedy = "leave it out here; a `train` stage without `layerwise` trains it"
        ctx.recipe_problem("groups" if config.groups is not None else "layerwise", message, remedy)
        return {}
    count = view.config.get("num_hidden_layers") or 1 + max(filter(None, placed.values()), default=0)
    if layers is not None and not _is_range(ctx, layers, count):
        return {}
    turns: dict[int, dict[str, ModuleView]] = {}
    for name, layer in placed.items():
        if layer is not None and _within(layer, layers):
            turns.setdefault(layer, {})[name] = targets[name]
    if targets and not turns and layers is not None:
        there = sorted({layer for layer in placed.values() if layer is not None})
        message = f"none of the modules that train is in the layers {layers[0]} to {layers[1]}"
        ctx.recipe_problem("layerwise.layers", message, f"they are in {_listed(there)}")
    trains = {
        layer: modules
        for layer, modules in sorted(turns.items())
        if NORMS in config.trainable or trained_count(modules.values(), config.trainable)
    }
    return trains or turns


def turn_bytes(turns: Iterable[Mapping[str, ModuleView]], config: Any) -> int:
    """Bytes that training layer by layer adds to the model: the largest layer's quantized weights, their gradients,
    and with latents also these, gradient, two moments and best; and the latents of all layers, set aside."""
    sizes = [weight_count(modules.values()) for modules in turns]
    if "weights" not in config.trainable:
        return 8 * max(sizes, default=0)
    return 28 * max(sizes, default=0) + 4 * sum(sizes)


def turns_note(turns: Mapping[int, Mapping[str, ModuleView]], config: Any) -> tuple[str, ...]:
    """Lines of a plan about the turns and what they leave on disk while they train."""
    counts = [trained_count(modules.values(), config.trainable) for modules in turns.values()]
    checkpoints = (KEPT + 1) * (20 if config.ema is not None else 16) * max(counts) + 4 * sum(counts)
    return (
        f"layer by layer: {_listed(list(turns))}, {config.steps} steps each",
        f"checkpoints and finished layers take up to {checkpoints / 1e6:,.1f} MB while it trains",
    )


def _is_range(ctx: PlanContext, layers: tuple[int, int], count: int) -> bool:
    """Whether `layers` are some of the model's; if not, it is recorded."""
    first, last = layers
    if first > last:
        ctx.recipe_problem(
            "layerwise.layers", f"the first layer, {first}, is behind the last, {last}", f"`layers: [{last}, {first}]`"
        )
    elif last >= count:
        message = f"layer {last} is outside the model: its {count} layers are 0 to {count - 1}"
        ctx.recipe_problem("layerwise.layers", message, f"`layers: [{min(first, count - 1)}, {count - 1}]`")
    return first <= last < count


def _within(index: int, layers: tuple[int, int] | None) -> bool:
    return layers is None or layers[0] <= index <= layers[1]


def _listed(layers: list[int]) -> str:
    """Layer numbers in words; a run of them by its ends."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers))}"
