"""`snap`: the quantized model as it will be shipped, every number rounded to fp16 once, on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.matching import summarize
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.errors import MismatchError, StageError
from a1q.models.view import QUANTIZED, SNAPPED, ModelView, ModuleView
from a1q.quant.bits import bpw, bpw_model, disk_bytes
from a1q.quant.build import make_scheme

if TYPE_CHECKING:
    from pathlib import Path

    from a1q.quant.module import QuantModule


@dataclass(frozen=True)
class SnapConfig:
    """Options of `snap`."""

    dtype: str
    mode: str
    only: tuple[str, ...] | None
    teacher: str | None
    teacher_model: Any
    kl_sequences: int


class SnapStage(Stage):
    """Quantized modules become snapped, or dense where they are baked; dense parameters are rounded with them.

    With `only`, named parameter sets alone are rounded, and modules go on training. Metrics with a teacher: held-out KL
    before and after, and their difference `kl_rounding`, what rounding costs. Before means parts in float32, with the
    indices that the last forward pass used; with `only`, the model as it trains.
    """

    Config = SnapConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """There must be quantized modules; those that are snapped already stay as they are, or are baked too."""
        view: ModelView = ctx.views["model"]
        baked, only = ctx.config.mode == "baked", ctx.config.only
        if baked and only:
            ctx.recipe_problem("only", "what is baked is snapped whole", "leave out `only`, or `mode: baked`")
            return Outcome(view=view)
        if not _has_work(ctx, view, baked):
            return Outcome(view=view)
        if only:
            changed = _rounded_in_place(ctx, view, only)
        elif baked:
            changed = {
                name: ModuleView(name, module.shape, module.kind)
                for name, module in view.modules.items()
                if module.state in (QUANTIZED, SNAPPED)
            }
        else:
            changed = {
                name: dataclasses.replace(module, state=SNAPPED, latent=False, snapped_sets=())
                for name, module in view.modules.items()
                if module.state == QUANTIZED
            }
        result = view.replace(changed)
        adapters = sum(view.modules[name].adapter > 0 for name in changed)
        became = "baked, dense in fp16" if baked else f"{', '.join(only)} rounded" if only else "snapped"
        notes = [
            f"{len(changed)} modules {became}",
            f"{bpw(result):.3f} bits per weight, whole model {bpw_model(result):.3f}",
        ]
        if adapters and not only:
            fate = "are merged into the weights" if baked else "stay, in fp16"
            notes.append(f"{adapters} unmerged adapters {fate}")
        return Outcome(
            view=result,
            disk_bytes=2 * result.parameters if baked else disk_bytes(result),
            memory_bytes=8 * view.parameters + 4 * view.parameters * bool(ctx.config.kl_sequences),
            notes=tuple(notes),
        )

    def run(self, ctx: StageContext) -> None:
        """Round, write, read back, compare."""
        from a1q.models.checkpoint import load_model, save_model
        from a1q.quant.measure import report_bits
        from a1q.quant.module import quantized_modules
        from a1q.training.device import prepare_torch

        source = ctx.inputs["model"]
        assert source is not None
        device = prepare_torch(ctx.runtime, ctx.seed)
        model = load_model(source.path, device=device)
        modules = dict(quantized_modules(model))
        unsnapped = {name: module for name, module in modules.items() if module.state == QUANTIZED}
        measure = _meter(ctx, device)
        if ctx.config.only:
            before = measure(model)
            _round_in_place(ctx, unsnapped)
        else:
            before = _unrounded(unsnapped, lambda: measure(model))
            _snap(ctx, unsnapped)
            _round_the_rest(model, modules)
        if ctx.config.mode == "baked":
            model = _bake(ctx, model, modules, source.path)
        else:
            save_model(model, ctx.out, tokenizer_from=source.path)
            compare_round_trip(model, ctx.out)
        ctx.metrics["round_trip"] = True
        after = measure(model)
        if before is not None and after is not None:
            ctx.metrics.update(kl_before=before, kl_after=after, kl_rounding=after - before)
        ctx.metrics.update(report_bits(ctx.out))


def _meter(ctx: StageContext, device: Any) -> Callable[[Any], float | None]:
    """KL to the teacher; None where there is none, or one that nobody named is not to be found."""
    from a1q.distill.meter import kl_meter

    measure = None
    try:
        measure = kl_meter(ctx, device)
    except MismatchError as error:
        if ctx.config.teacher is not None:
            raise
        ctx.log(f"what rounding costs is not measured, unless this stage is run again with --force: {error}")
    return measure or _nothing


def _nothing(model: Any) -> None:
    """The measurement where there is no teacher."""


def _has_work(ctx: PlanContext, view: ModelView, baked: bool) -> bool:
    """Whether there are modules to round or to bake; if not, the reason is recorded."""
    states = {module.state for module in view.modules.values()}
    if QUANTIZED in states or (baked and SNAPPED in states):
        return True
    if SNAPPED in states:
        remedy = "snap once, after all training" if not ctx.config.only else "put it before the last `snap`"
        ctx.recipe_problem("", "the model here is snapped already", remedy)
    else:
        ctx.recipe_problem("", "no module of the model here is quantized", "put a `quantize` stage before it")
    return False


def _rounded_in_place(ctx: PlanContext, view: ModelView, sets: tuple[str, ...]) -> dict[str, ModuleView]:
    """The modules that have one of `sets`, as they will be."""
    changed = {
        name: dataclasses.replace(module, snapped_sets=sets)
        for name, module in view.modules.items()
        if module.state == QUANTIZED and set(sets) & set(make_scheme(module.scheme or {}).trainable)
    }
    if not changed:
        names = summarize(name for name, module in view.modules.items() if module.state == QUANTIZED)
        message = f"no module here has {' or '.join(sets)}: {', '.join(names)}"
        ctx.recipe_problem("only", message, "schemes with a low-rank scale have them, such as lut_lowrank")
    return changed


def _unrounded(modules: Mapping[str, QuantModule], measure: Callable[[], float | None]) -> float | None:
    """`measure` of the model with fixed indices and parts as they are in float32."""
    flags = {name: module.straight_through_fp16 for name, module in modules.items()}
    for module in modules.values():
        module.drop_latent()
        module.straight_through_fp16 = False
    found = measure()
    for name, module in modules.items():
        module.straight_through_fp16 = flags[name]
    return found


def _snap(ctx: StageContext, modules: Mapping[str, QuantModule]) -> None:
    """Snap `modules` one by one; their largest relative squared error goes to the metrics."""
    from a1q.quant.measure import relative_error

    worst, worst_name = 0.0, ""
    for step, (name, module) in enumerate(modules.items(), 1):
        before = module.dequantize()
        module.snap()
        wrong, whole = relative_error(before, module.dequantize(), None)
        if whole and wrong / whole >= worst:
            worst, worst_name = wrong / whole, name
        ctx.progress(step, len(modules))
    ctx.metrics.update(modules=len(modules), worst_error=worst, worst_module=worst_name)


def _round_in_place(ctx: StageContext, modules: Mapping[str, QuantModule]) -> None:
    """Round the magnitudes of `modules`, the one set that `only` knows."""
    from a1q.quant.magnitudes import MAGNITUDES, snap_magnitudes

    having = {name: module for name, module in modules.items() if module.trainable(MAGNITUDES)}
    worst = largest = 0.0
    for step, module in enumerate(having.values(), 1):
        worst = max(worst, snap_magnitudes(module))
        largest = max(largest, *(float(part.detach().abs().max()) for part in module.trainable(MAGNITUDES)))
        ctx.progress(step, len(having))
    ctx.metrics.update(modules=len(having), worst_change=worst, largest_magnitude=largest)


def _round_the_rest(model: Any, modules: Mapping[str, QuantModule]) -> None:
    """Round every parameter outside the quantized modules, and their biases.

    Raises:
        StageError: if one does not fit in fp16.
    """
    import torch

    from a1q.quant.grid import to_fp16

    own = {id(parameter) for module in modules.values() for parameter in module.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in own and name.rpartition(".")[2] != "bias":
                continue
            largest = float(parameter.abs().max()) if parameter.numel() else 0.0
            if not largest <= torch.finfo(torch.float16).max:
                raise StageError(f"{name} does not fit in fp16: its largest magnitude is {largest:g}")
            parameter.copy_(to_fp16(parameter))


def _bake(ctx: StageContext, model: Any, modules: Mapping[str, QuantModule], source: Path) -> Any:
    """Write the dense fp16 model of snapped `modules`, and return what is read back of it."""
    import torch

    from a1q.models.baked import fp16_state, largest_difference, save_baked
    from a1q.models.checkpoint import load_model

    state = fp16_state(model, ctx.progress, merge=True)
    ctx.metrics["modules"] = len(modules)
    merged = sum(module.adapter is not None for module in modules.values())
    ctx.metrics["baked_difference"] = max(
        largest_difference(module.dequantize() + module.adapter_delta(), state[f"{name}.weight"])
        for name, module in modules.items()
    )
    if merged:
        ctx.log(f"{merged} unmerged adapters are merged into the baked weights")
        ctx.metrics["merged_adapters"] = merged
    save_baked(state, model.config, ctx.out, source)
    device = next(model.parameters()).device
    found = load_model(ctx.out, device=device)
    read = found.state_dict()
    refuse_differing([name for name in state if not torch.equal(state[name].float(), read[name].cpu())])
    return found


def compare_round_trip(model: Any, folder: Path) -> None:
    """Read the model in `folder` back and compare it with `model`, bit for bit.

    Raises:
        StageError: if a tensor differs.
    """
    import torch

    from a1q.models.checkpoint import load_model

    written, found = model.state_dict(), load_model(folder).state_dict()
    refuse_differing(
        [
            name
            for name in sorted(written.keys() | found.keys())
            if name not in written or name not in found or not torch.equal(written[name].cpu(), found[name])
        ]
    )


def refuse_differing(names: list[str]) -> None:
    """Raise `StageError` that names tensors read back differently, if there are any."""
    if names:
        raise StageError(f"what was written reads back differently: {', '.join(names[:8])}")
