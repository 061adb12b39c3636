"""`calibrate`: E[x²] per input channel of every linear layer, a tied head included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.models.view import ModelView
from a1q.quant.statistics import measured_modules


@dataclass(frozen=True)
class CalibrateConfig:
    """Options of `calibrate`."""

    data: str
    sequences: int
    batch: int


class CalibrateStage(Stage):
    """Run the model over text and keep the mean square of what every linear layer sees."""

    version = 2
    Config = CalibrateConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Predict the sizes."""
        view: ModelView = ctx.views["model"]
        measured = [view.modules[name] for name in measured_modules(view, view.modules)]
        tokens = ctx.config.sequences * ctx.data[ctx.config.data].config["seq_len"]
        batch_tokens = ctx.config.batch * ctx.data[ctx.config.data].config["seq_len"]
        widest = max((max(module.shape) for module in measured), default=0)
        logits = 4 * batch_tokens * view.config.get("vocab_size", 0)
        return Outcome(
            view={"modules": [module.name for module in measured]},
            disk_bytes=4 * sum(module.shape[1] for module in measured),
            memory_bytes=4 * view.parameters + 16 * batch_tokens * widest + logits,
            notes=(f"{len(measured)} modules over {tokens:,} tokens",),
        )

    def run(self, ctx: StageContext) -> None:
        """Stream the sequences through the model."""
        from a1q.data import token_sequences
        from a1q.models.checkpoint import load_model
        from a1q.quant.statistics import collect_statistics, write_statistics
        from a1q.training.device import prepare_torch

        model = ctx.inputs["model"]
        assert model is not None
        device = prepare_torch(ctx.runtime, ctx.seed)
        entry: Any = ctx.data[ctx.config.data]
        length = entry.config["seq_len"]
        tokens = token_sequences(entry.config, model.path, "train", length, ctx.config.sequences, ctx.seed)
        values = collect_statistics(
            load_model(model.path, device=device),
            tokens,
            batch_size=ctx.config.batch,
            progress=lambda done, total: ctx.progress(done, total, tokens=done * length),
        )
        write_statistics(ctx.out, values)
        ctx.meta.update(model=model.digest, data=entry.digest, tokens=int(tokens.size))
        ctx.metrics.update(modules=len(values), tokens=int(tokens.size))
