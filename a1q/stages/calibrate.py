"""`calibrate`: E[x²] and E[x xᵀ] of what every linear layer is multiplied with, a tied head included."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.models.view import PREPARED, ModuleView
from a1q.quant.statistics import measured_modules

SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Linears that take one input together, in the families of decoders there are."""


@dataclass(frozen=True)
class CalibrateConfig:
    """Options of `calibrate`."""

    data: str
    sequences: int
    batch: int
    gram: bool


class CalibrateStage(Stage):
    """Run the model over text, decoder layer by decoder layer, and keep second moments of what every linear sees."""

    version = 3
    Config = CalibrateConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Predict the sizes."""
        config, view = ctx.config, ctx.views["model"]
        measured = [view.modules[name] for name in measured_modules(view, view.modules)]
        length = ctx.data[config.data].config["seq_len"]
        tokens = config.sequences * length
        widest = max((module.shape[1] for module in measured), default=0)
        broadest = max((max(module.shape) for module in measured if module.kind == "linear"), default=0)
        layers = _grams(measured) if config.gram else {}
        products = [sum(columns**2 for columns in layer.values()) for layer in layers.values()]
        notes = [f"{len(measured)} modules over {tokens:,} tokens"]
        if config.gram and tokens < widest:
            notes.append(_too_few(tokens, widest))
        states = 4 * tokens * view.config.get("hidden_size", 0)
        # sums in float64 with one product before it is added, and what is written in float32
        sums = 16 * max(products, default=0) + 12 * widest**2 * config.gram
        return Outcome(
            view={
                "modules": [module.name for module in measured],
                "prepared": view.config.get(PREPARED, ()),
                "length": length,
            },
            disk_bytes=4 * (tokens + sum(module.shape[1] for module in measured) + sum(products)),
            memory_bytes=4 * view.parameters + states + 16 * config.batch * length * broadest + sums,
            notes=tuple(notes),
        )

    def run(self, ctx: StageContext) -> None:
        """Stream the sequences through the model."""
        from a1q.data import token_sequences
        from a1q.models.checkpoint import load_model
        from a1q.quant.calibration import measure_statistics
        from a1q.training.device import prepare_torch

        model = ctx.inputs["model"]
        assert model is not None
        device = prepare_torch(ctx.runtime, ctx.seed)
        entry: Any = ctx.data[ctx.config.data]
        length = entry.config["seq_len"]
        tokens = token_sequences(entry.config, model.path, "train", length, ctx.config.sequences, ctx.seed)
        values = measure_statistics(
            load_model(model.path, device=device),
            tokens,
            ctx.out,
            batch_size=ctx.config.batch,
            gram=ctx.config.gram,
            progress=ctx.progress,
        )
        widest = max(len(value) for value in values.values())
        if ctx.config.gram and tokens.size < widest:
            ctx.log(f"WARNING: {_too_few(tokens.size, widest)}")
        ctx.meta.update(model=model.digest, data=entry.digest, tokens=int(tokens.size))
        ctx.metrics.update(modules=len(values), tokens=int(tokens.size))


def _grams(modules: Iterable[ModuleView]) -> dict[str, dict[tuple[str, str], int]]:
    """Part of the model -> (module, input) -> in, of every E[x xᵀ] that is stored."""
    layers: dict[str, dict[tuple[str, str], int]] = {}
    for module in modules:
        owner, _, leaf = module.name.rpartition(".")
        layer = owner.rpartition(".")[0]
        layers.setdefault(layer, {})[owner, SHARED.get(leaf, leaf)] = module.shape[1]
    return layers


def _too_few(tokens: int, widest: int) -> str:
    return (
        f"{tokens:,} tokens say little of how {widest:,} inputs of the widest linear go together: "
        "fits fall back on what each says alone; raise `sequences`"
    )
