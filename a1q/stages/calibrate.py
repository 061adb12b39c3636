"""`calibrate`: what every linear layer is multiplied with (E[x²], E[x xᵀ]), and what changes between layers cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.models.view import PREPARED, ModelView, ModuleView
from a1q.quant.planning import LOGITS, input_matrices
from a1q.quant.statistics import measured_modules


@dataclass(frozen=True)
class CalibrateConfig:
    """Options of `calibrate`."""

    data: str
    sequences: int
    batch: int
    gram: bool
    gradients: bool
    gradient_sequences: int

    @property
    def sampled(self) -> int:
        """Sequences that gradients are measured on."""
        return min(self.gradient_sequences, self.sequences) if self.gradients else 0


class CalibrateStage(Stage):
    """Run the model over text, decoder layer by decoder layer, and keep second moments of what every linear sees.

    With `gradients` also the Fisher information of the states between layers (`a1q.quant.fisher`).
    """

    version = 4
    Config = CalibrateConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Predict the sizes."""
        config, view = ctx.config, ctx.views["model"]
        measured = [view.modules[name] for name in measured_modules(view, view.modules)]
        length = ctx.data[config.data].config["seq_len"]
        tokens = config.sequences * length
        widest = max((module.shape[1] for module in measured), default=0)
        broadest = max((max(module.shape) for module in measured if module.kind == "linear"), default=0)
        layers = input_matrices(measured) if config.gram else {}
        products = [sum(columns**2 for columns in layer.values()) for layer in layers.values()]
        hidden, depth = (view.config.get(key, 0) for key in ("hidden_size", "num_hidden_layers"))
        notes = [f"{len(measured)} modules over {tokens:,} tokens"]
        if config.sampled:
            notes.append(f"gradients at {depth} decoder layers over {config.sampled * length:,} tokens")
        notes += _warnings(config, length, widest, hidden)
        states = 4 * tokens * hidden
        # sums in float64 with one product before it is added, and what is written in float32
        sums = 16 * max(products, default=0) + 12 * widest**2 * config.gram
        inputs = states + 16 * config.batch * length * broadest + sums
        gradients = _gradient_memory(view, measured, min(config.batch, config.sampled), length)
        stored = tokens + sum(module.shape[1] for module in measured) + sum(products)
        return Outcome(
            view={
                "modules": [module.name for module in measured],
                "prepared": view.config.get(PREPARED, ()),
                "length": length,
                "tokens": tokens,
            },
            disk_bytes=4 * (stored + depth * hidden**2 * bool(config.sampled)),
            memory_bytes=4 * view.parameters + max(inputs, gradients),
            notes=tuple(notes),
        )

    def run(self, ctx: StageContext) -> None:
        """Stream the sequences through the model."""
        from a1q.data import read_sequences
        from a1q.models.checkpoint import load_model
        from a1q.quant.calibration import measure_statistics
        from a1q.training.device import prepare_torch

        source = ctx.inputs["model"]
        assert source is not None
        device = prepare_torch(ctx.runtime, ctx.seed)
        entry: Any = ctx.data[ctx.config.data]
        length = entry.config["seq_len"]
        text = read_sequences(entry.config, source.path, "train", length, ctx.config.sequences, ctx.seed)
        model = load_model(source.path, device=device)
        values = measure_statistics(
            model,
            text.tokens,
            ctx.out,
            borders=text.borders,
            batch_size=ctx.config.batch,
            gram=ctx.config.gram,
            gradient_sequences=ctx.config.sampled,
            seed=ctx.seed,
            progress=ctx.progress,
        )
        widest = max(len(value) for value in values.values())
        for warning in _warnings(ctx.config, length, widest, model.config.hidden_size):
            ctx.log(f"WARNING: {warning}")
        ctx.meta.update(model=source.digest, data=entry.digest, tokens=int(text.tokens.size))
        ctx.metrics.update(modules=len(values), tokens=int(text.tokens.size))


def _gradient_memory(view: ModelView, measured: Iterable[ModuleView], batch: int, length: int) -> int:
    """Peak bytes beside the model while gradients of batches of `batch` sequences are measured; 0 for no sequences."""
    hidden, depth, vocabulary = (view.config.get(key, 0) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    # measured on Qwen3: a layer keeps what its linears take and give, and half as much again comes on the way back
    layers: dict[str, int] = {}
    for module in measured:
        layer = module.name.rpartition(".")[0].rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + sum(module.shape) * bool(layer)
    block = 10 * batch * length * max(layers.values(), default=0)
    # logits, their exponentials and sums of those, and what a soft cap keeps
    logits = 16 * min(max(LOGITS, batch * vocabulary), batch * length * vocabulary)
    boundaries = 4 * batch * length * hidden * (depth + 1)
    return (8 * depth * hidden**2 + boundaries + max(block, logits)) * bool(batch)


def _warnings(config: CalibrateConfig, length: int, widest: int, hidden: int) -> list[str]:
    """What is measured on too little text, of sequences of `length` tokens."""
    found = []
    tokens, sampled = config.sequences * length, config.sampled * length
    if config.gram and tokens < widest:
        found.append(
            f"{tokens:,} tokens say little of how {widest:,} inputs of the widest linear go together: "
            "fits fall back on what each says alone; raise `sequences`"
        )
    if config.gradients and sampled < hidden:
        found.append(
            f"gradients of {sampled:,} tokens say little of {hidden:,} hidden channels: "
            f"raise `{'gradient_sequences' if config.sampled < config.sequences else 'sequences'}`"
        )
    return found
