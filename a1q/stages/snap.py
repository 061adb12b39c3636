"""`snap`: the quantized model as it will be shipped, every number rounded to fp16 once, on the CPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.errors import StageError
from a1q.models.view import QUANTIZED, SNAPPED, ModelView
from a1q.quant.bits import bpw, bpw_model, disk_bytes

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class SnapConfig:
    """Options of `snap`."""

    dtype: str


class SnapStage(Stage):
    """Quantized modules become snapped; dense parameters are rounded with them."""

    Config = SnapConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """There must be quantized modules; those that are snapped already stay as they are."""
        view: ModelView = ctx.views["model"]
        states = [module.state for module in view.modules.values()]
        if QUANTIZED not in states:
            if SNAPPED in states:
                ctx.recipe_problem("", "the model here is snapped already", "snap once, after all training")
            else:
                ctx.recipe_problem("", "no module of the model here is quantized", "put a `quantize` stage before it")
        changed = {
            name: dataclasses.replace(module, state=SNAPPED, latent=False)
            for name, module in view.modules.items()
            if module.state == QUANTIZED
        }
        result = view.replace(changed)
        adapters = sum(module.adapter > 0 for module in changed.values())
        return Outcome(
            view=result,
            disk_bytes=disk_bytes(result),
            memory_bytes=8 * view.parameters,
            notes=(
                f"{len(changed)} modules, {bpw(result):.3f} bits per weight, whole model {bpw_model(result):.3f}",
                *([f"{adapters} unmerged adapters stay, in fp16"] if adapters else []),
            ),
        )

    def run(self, ctx: StageContext) -> None:
        """Round, write, read back, compare."""
        import torch

        from a1q.models.checkpoint import load_model, save_model
        from a1q.quant.grid import to_fp16
        from a1q.quant.measure import relative_error, report_bits
        from a1q.quant.module import quantized_modules
        from a1q.training.device import prepare_torch

        source = ctx.inputs["model"]
        assert source is not None
        prepare_torch(ctx.runtime, ctx.seed)
        model = load_model(source.path)
        modules = dict(quantized_modules(model))
        unsnapped = {name: module for name, module in modules.items() if module.state == QUANTIZED}
        worst, worst_name = 0.0, ""
        for step, (name, module) in enumerate(unsnapped.items(), 1):
            before = module.dequantize()
            module.snap()
            wrong, whole = relative_error(before, module.dequantize(), None)
            if whole and wrong / whole >= worst:
                worst, worst_name = wrong / whole, name
            ctx.progress(step, len(unsnapped))
        own = {id(parameter) for module in modules.values() for parameter in module.parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                inside = id(parameter) in own and name.rpartition(".")[2] != "bias"
                if not inside:
                    largest = float(parameter.abs().max()) if parameter.numel() else 0.0
                    if not largest <= torch.finfo(torch.float16).max:
                        raise StageError(f"{name} does not fit in fp16: its largest magnitude is {largest:g}")
                    parameter.copy_(to_fp16(parameter))
        save_model(model, ctx.out, tokenizer_from=source.path)
        compare_round_trip(model, ctx.out)
        ctx.metrics.update(
            modules=len(unsnapped), worst_error=worst, worst_module=worst_name, round_trip=True, **report_bits(ctx.out)
        )


def compare_round_trip(model: Any, folder: Path) -> None:
    """Read the model in `folder` back and compare it with `model`, bit for bit.

    Raises:
        StageError: if a tensor differs.
    """
    import torch

    from a1q.models.checkpoint import load_model

    written, found = model.state_dict(), load_model(folder).state_dict()
    differing = [
        name
        for name in sorted(written.keys() | found.keys())
        if name not in written or name not in found or not torch.equal(written[name].cpu(), found[name])
    ]
    if differing:
        raise StageError(f"what was written reads back differently: {', '.join(differing[:8])}")
