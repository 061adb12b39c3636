"""`convert`: quantized linears and embeddings get other bits, ranks or another scheme, fitted anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.matching import resolve_rules, summarize
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.models.view import DENSE, QUANTIZED, ModelView, ModuleView
from a1q.quant.bits import disk_bytes
from a1q.quant.build import complete, make_scheme
from a1q.quant.planning import check_statistics, fit_memory, notes, order_memory, planned_modules
from a1q.training.reconstruction import ReconstructConfig, check_reconstruction

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.importance import Inputs
    from a1q.quant.module import QuantModule

PUBLISHED = "lut_lowrank"
"""The scheme that `method: published` is for."""


@dataclass(frozen=True)
class ConvertConfig:
    """Options of `convert`."""

    rules: Mapping[str, Mapping[str, Any]]
    target: str
    method: str
    compare: str | None
    statistics: str | None
    teacher: str | None
    teacher_model: Any
    kl_sequences: int
    sequential: bool
    reconstruct: ReconstructConfig | None

    def __post_init__(self) -> None:
        """Layers have no order where neither fits nor training look at what they take."""
        if self.method != "refit" and self.reconstruct is None:
            object.__setattr__(self, "sequential", False)


class ConvertStage(Stage):
    """Fit new parts to the latent or the quantized weights of every module named."""

    version = 4
    Config = ConvertConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Resolve the rules; dense and snapped modules are problems, and so is what a scheme can't take."""
        view: ModelView = ctx.views["model"]
        owners = resolve_rules(ctx, ctx.config.rules, "rules", view)
        changed = _planned(ctx, view, owners)
        _check_compare(ctx, view, changed)
        check_statistics(ctx)
        check_reconstruction(ctx)
        if ctx.config.method == "exact" and ctx.config.reconstruct is not None:
            ctx.recipe_problem("reconstruct", "`method: exact` keeps every weight, and a reconstruction trains them")
        result = view.replace(changed)
        lines = notes(result, changed, owners) if changed else ()
        without = [name for name in changed if not view.modules[name].latent]
        if ctx.config.target == "latent" and without:
            lines = (*lines, f"{len(without)} modules have no latent: their quantized weights are fitted")
        return Outcome(
            view=result,
            disk_bytes=disk_bytes(result),
            memory_bytes=fit_memory(result, changed)
            + order_memory(ctx, result, changed)
            + 4 * view.parameters * (bool(ctx.config.kl_sequences) + bool(ctx.config.compare)),
            notes=lines,
        )

    def run(self, ctx: StageContext) -> None:
        """Fit in model order, measure before and after, write the model."""
        from a1q.distill.meter import kl_meter
        from a1q.models.checkpoint import load_model, save_model
        from a1q.models.view import read_view
        from a1q.quant.measure import error_by_group, error_by_layer, report_bits
        from a1q.quant.statistics import measured_modules, read_statistics
        from a1q.training.blockwise import fit_in_order
        from a1q.training.device import prepare_torch

        source = ctx.inputs["model"]
        assert source is not None
        device = prepare_torch(ctx.runtime, ctx.seed)
        view = read_view(source.path)
        plan = PlanContext(ctx.id, ctx.config, {"model": view}, ctx.groups, ctx.data, lambda *_: None)
        owners = resolve_rules(plan, ctx.config.rules, "rules", view)
        changed = _planned(plan, view, owners)
        statistics = read_statistics(ctx.inputs["statistics"], measured_modules(view, changed))
        model = load_model(source.path, device=device)
        measure = kl_meter(ctx, device)
        if measure is not None:
            ctx.metrics["kl_before"] = measure(model)
            if ctx.config.compare:
                copy = _published(load_model(source.path, device=device), changed, ctx)
                ctx.metrics["kl_published"] = measure(copy)
                del copy
        fitter = _Fitter(model, changed, ctx.config, ctx.seed)
        found = fit_in_order(ctx, model, list(changed), fitter, statistics, ctx.config, {"model": source.digest})
        if measure is not None:
            ctx.metrics["kl_after"] = measure(model)
            if ctx.config.compare:
                _report_comparison(ctx)
        save_model(model, ctx.out, tokenizer_from=source.path)
        ctx.metrics.update(
            modules=len(changed),
            error_before=error_by_group((owners[name], *error) for name, error in fitter.before.items()),
            error_after=error_by_group((owners[name], *error) for name, error in fitter.after.items()),
            error_by_layer=error_by_layer(fitter.after),
            **found,
            **report_bits(ctx.out),
        )


class _Fitter:
    """Fits quantized modules anew, in their places."""

    def __init__(self, model: Any, planned: Mapping[str, ModuleView], config: ConvertConfig, seed: int):
        self.model, self.planned, self.config, self.seed = model, planned, config, seed
        self.before: dict[str, tuple[float, float]] = {}
        self.after: dict[str, tuple[float, float]] = {}

    def fit(self, name: str, inputs: Inputs | None) -> None:
        from a1q.quant.magnitudes import say_anew
        from a1q.quant.measure import relative_error
        from a1q.quant.module import naming

        module, scheme = self._module(name)
        target = _target(module, self.config.target)
        self.before[name] = relative_error(target, module.dequantize() + module.adapter_delta(), inputs)
        module.drop_adapter()
        if self.config.method == "exact":
            say_anew(module)
        elif self.config.method == "published":
            _refit_published(module, scheme, target, self.seed)
        else:
            with naming(name):
                module.refit(scheme, target, inputs, self.seed)
        self.after[name] = relative_error(target, module.dequantize(), inputs)

    def restore(self, name: str, parts: Mapping[str, Tensor], latent: Tensor | None) -> None:
        module, scheme = self._module(name)
        module.drop_adapter()
        module.set_scheme(scheme, parts, latent)

    def _module(self, name: str) -> tuple[QuantModule, Mapping[str, Any]]:
        """The module and the scheme it gets."""
        scheme = self.planned[name].scheme
        assert scheme is not None
        return self.model.get_submodule(name), scheme


def _planned(ctx: PlanContext, view: ModelView, owners: Mapping[str, str]) -> dict[str, ModuleView]:
    """The modules that will be converted, as they will be, in model order; problems go to `ctx`."""
    changed: dict[str, ModuleView] = {}
    for group in dict.fromkeys(owners.values()):
        path, rule = f"rules.{group}", ctx.config.rules[group]
        modules = [view.modules[name] for name, owner in owners.items() if owner == group]
        wrong = [module for module in modules if module.state != QUANTIZED]
        if wrong:
            state, names = wrong[0].state, ", ".join(summarize(module.name for module in wrong))
            remedy = "`quantize` them first" if state == DENSE else "put `convert` before `snap`"
            ctx.recipe_problem(path, f"{len(wrong)} modules are {state}, not quantized: {names}", remedy)
            continue
        wanted = [(module, _merged(module.scheme or {}, rule), module.latent) for module in modules]
        if ctx.config.method == "published" and not all(_publishable(old.scheme or {}, new) for old, new, _ in wanted):
            message = f"`method: published` takes {PUBLISHED} to the same or fewer bits and the same or more ranks"
            ctx.recipe_problem(path, f"{message}, without symmetric tables", "use `method: refit`")
            continue
        if ctx.config.method == "exact" and (problem := _inexact(wanted)):
            ctx.recipe_problem(path, *problem)
            continue
        changed |= planned_modules(ctx, path, wanted)
    return {name: changed[name] for name in view.modules if name in changed}


def _merged(old: Mapping[str, Any], rule: Mapping[str, Any]) -> dict[str, Any]:
    """The new scheme: options of the old one that the rule does not name stay; another scheme inherits its bits."""
    if rule.get("scheme", old["scheme"]) != old["scheme"]:
        return {"bits": old["bits"], **rule}
    return {**old, **rule}


def _publishable(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    both = old["scheme"] == new["scheme"] == PUBLISHED
    free = "symmetric" not in (old.get("lut"), new.get("lut"))  # entries move one by one
    return both and free and new["bits"] <= old["bits"] and new["rank"] >= old["rank"]


def _check_compare(ctx: PlanContext, view: ModelView, changed: Mapping[str, ModuleView]) -> None:
    """Record why the published conversion can't stand beside this one."""
    if not ctx.config.compare:
        return
    unlike = [
        name
        for name, module in changed.items()
        if not _publishable(view.modules[name].scheme or {}, module.scheme or {})
    ]
    if unlike:
        message = f"the published conversion takes {PUBLISHED} to the same or fewer bits and the same or more ranks"
        ctx.recipe_problem("compare", f"{message}, unlike {', '.join(summarize(unlike))}", "leave `compare` out")
    if ctx.config.method == "published":
        ctx.recipe_problem("compare", "`method: published` is what would be compared with", "leave one of them out")
    teacher = ctx.views.get("teacher")
    if ctx.config.kl_sequences == 0 or teacher is None or teacher.get("tune_sequences") == 0:
        remedy = "put a `kd` stage with `tune_sequences` before it, and `kl_sequences` above 0"
        ctx.recipe_problem("compare", "there is no KL to compare", remedy)


def _published(model: Any, changed: Mapping[str, ModuleView], ctx: StageContext) -> Any:
    """`model`, converted as published."""
    for name, view in changed.items():
        module = model.get_submodule(name)
        wanted = _target(module, ctx.config.target)
        module.drop_adapter()
        assert view.scheme is not None
        _refit_published(module, view.scheme, wanted, ctx.seed)
    return model


def _report_comparison(ctx: StageContext) -> None:
    before, ours, published = (ctx.metrics[f"kl_{name}"] for name in ("before", "after", "published"))
    ctx.metrics["kl_saved"] = published - ours
    ctx.log(
        f"held-out KL {before:.5g} before; {ours:.5g} converted here, {published:.5g} as published: "
        f"{published - ours:.5g} saved"
    )


def _inexact(wanted: Sequence[tuple[ModuleView, Mapping[str, Any], bool]]) -> tuple[str, str] | None:
    """Why modules can't be said anew without any change, and a hint; None where they can."""
    if any(complete(old.scheme or {}) != complete(new) for old, new, _ in wanted):
        return "`method: exact` changes neither bits nor rank nor anything else", "leave the rule empty: `{}`"
    flat = [old.name for old, new, _ in wanted if "magnitudes" not in make_scheme(new).trainable]
    if flat:
        named = ", ".join(summarize(flat))
        return f"`method: exact` moves magnitudes, and {len(flat)} modules' schemes have none: {named}", ""
    adapted = [old.name for old, _, _ in wanted if old.adapter]
    if adapted:
        named = ", ".join(summarize(adapted))
        return f"{len(adapted)} modules hold an unmerged adapter, which only a fit can merge: {named}", ""
    return None


def _target(module: QuantModule, wanted: str) -> Tensor:
    """What is fitted, [out, in]: the latent where wanted and there, else the quantized weight; plus the adapter."""
    base = module.latent.detach() if wanted == "latent" and module.latent is not None else module.dequantize()
    return base + module.adapter_delta()


def _refit_published(module: QuantModule, spec: Mapping[str, Any], target: Tensor, seed: int) -> None:
    from a1q.quant.palettized_factors import looked_up
    from a1q.quant.published import convert_published

    scheme = make_scheme(spec)
    parts = convert_published(looked_up(module.parts()), spec["bits"], spec["rank"], seed)
    parts = scheme.with_factor_tables(parts)  # type: ignore[attr-defined]
    indices = scheme.assign(parts, target)
    module.set_scheme(spec, {"indices": indices, **parts}, target)
