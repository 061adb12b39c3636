"""`quantize`: dense linears and embeddings become quantized ones, a scheme per rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1q.engine.matching import resolve_rules, summarize
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.models.view import DENSE, ModelView, ModuleView
from a1q.quant.bits import disk_bytes
from a1q.quant.planning import check_statistics, fit_memory, notes, order_memory, planned_modules
from a1q.quant.rules import Rule, read_rules
from a1q.training.reconstruction import ReconstructConfig, check_reconstruction


@dataclass(frozen=True)
class QuantizeConfig:
    """Options of `quantize`."""

    rules: Mapping[str, Mapping[str, Any]] | str
    """Group -> scheme, or the id of an `allocate` stage."""
    rest: Any
    """`keep`, `error`, or a scheme mapping."""
    statistics: str | None
    latent: str
    sequential: bool
    reconstruct: ReconstructConfig | None


class QuantizeStage(Stage):
    """Fit schemes to dense weights, decoder layer by decoder layer."""

    version = 3
    Config = QuantizeConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Resolve the rules; quantized modules and shapes a scheme can't take are problems."""
        view: ModelView = ctx.views["model"]
        rules = _rules(ctx, view)
        changed = _planned(ctx, view, rules)
        owners = {name: rule.group for name, rule in rules.items()}
        check_statistics(ctx)
        check_reconstruction(ctx)
        result = view.replace(changed)
        undecided = any(module.alternatives for module in changed.values())
        lines = (f"{ctx.config.rules!r} chooses; here is each module at its largest:",) if undecided else ()
        return Outcome(
            view=result,
            disk_bytes=disk_bytes(result),
            memory_bytes=fit_memory(result, changed) + order_memory(ctx, result, changed),
            notes=(*lines, *notes(result, changed, owners)) if changed else (),
        )

    def run(self, ctx: StageContext) -> None:
        """Fit in model order and write the model."""
        from a1q.models.checkpoint import load_model, save_model
        from a1q.models.view import read_view
        from a1q.quant.fitter import DenseFitter
        from a1q.quant.measure import error_by_group, error_by_layer, report_bits
        from a1q.quant.statistics import measured_modules, read_statistics
        from a1q.training.blockwise import fit_in_order
        from a1q.training.device import prepare_torch

        config, source = ctx.config, ctx.inputs["model"]
        assert source is not None
        device = prepare_torch(ctx.runtime, ctx.seed)
        view = read_view(source.path)
        chosen = ctx.inputs.get("rules")
        views = {"model": view, "rules": chosen and read_rules(chosen)}
        plan = PlanContext(ctx.id, config, views, ctx.groups, ctx.data, lambda *_: None)
        rules = _rules(plan, view)
        changed = _planned(plan, view, rules)
        statistics = read_statistics(ctx.inputs["statistics"], measured_modules(view, changed))
        model = load_model(source.path, device=device)
        specs = {name: module.scheme for name, module in changed.items() if module.scheme}
        fitter = DenseFitter(model, specs, {name for name, module in changed.items() if module.latent}, ctx.seed)
        found = fit_in_order(ctx, model, list(changed), fitter, statistics, config, {"model": source.digest})
        save_model(model, ctx.out, tokenizer_from=source.path)
        errors = [(rules[name].group if name in rules else "rest", *error) for name, error in fitter.errors.items()]
        ctx.metrics.update(
            modules=len(changed),
            error=error_by_group(errors),
            error_by_layer=error_by_layer(fitter.errors),
            **found,
            **report_bits(ctx.out),
        )


def _rules(ctx: PlanContext, view: ModelView) -> dict[str, Rule]:
    """The rule of every module that has one, in model order: the recipe's, or those an `allocate` stage chose."""
    chosen: Mapping[str, Rule] | None = ctx.views.get("rules")
    if chosen is None:
        owners = resolve_rules(ctx, ctx.config.rules, "rules", view)
        return {name: Rule(group, (ctx.config.rules[group],)) for name, group in owners.items()}
    if missing := [name for name in chosen if name not in view.modules]:
        named = ", ".join(summarize(missing))
        ctx.mismatch("rules", f"{ctx.config.rules!r} chose for {len(missing)} modules that this model lacks", named)
    return {name: chosen[name] for name in view.modules if name in chosen}


def _planned(ctx: PlanContext, view: ModelView, rules: Mapping[str, Rule]) -> dict[str, ModuleView]:
    """The modules that will be quantized, as they will be, in model order; problems go to `ctx`."""
    config: QuantizeConfig = ctx.config
    keep = config.latent == "keep"
    changed: dict[str, ModuleView] = {}
    for group in dict.fromkeys(rule.group for rule in rules.values()):
        path = "rules" if isinstance(config.rules, str) else f"rules.{group}"
        modules = [view.modules[name] for name, rule in rules.items() if rule.group == group]
        taken = [module.name for module in modules if module.state != DENSE]
        if taken:
            ctx.recipe_problem(
                path,
                f"{len(taken)} modules are already {view.modules[taken[0]].state}: {', '.join(summarize(taken))}",
                "`quantize` takes dense modules; `convert` changes the scheme of quantized ones",
            )
        else:
            wanted = [(module, rules[module.name].schemes[0], keep) for module in modules]
            for name, planned in planned_modules(ctx, path, wanted).items():
                changed[name] = dataclasses.replace(planned, alternatives=rules[name].schemes[1:])
    rest = [
        module
        for name, module in view.modules.items()
        if name not in rules and module.state == DENSE and module.kind == "linear"
    ]
    if config.rest == "error" and rest:
        named = ", ".join(summarize(module.name for module in rest))
        ctx.mismatch("rest", f"{len(rest)} linears are in no rule", named)
    elif isinstance(config.rest, Mapping):
        changed |= planned_modules(ctx, "rest", [(module, config.rest, keep) for module in rest])
    return {name: changed[name] for name in view.modules if name in changed}
