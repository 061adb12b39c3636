"""`quantize`: dense linears and embeddings become quantized ones, a scheme per rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1q.engine.matching import resolve_rules, summarize
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.models.view import DENSE, ModelView, ModuleView
from a1q.quant.bits import disk_bytes
from a1q.quant.planning import fit_memory, notes, planned_modules


@dataclass(frozen=True)
class QuantizeConfig:
    """Options of `quantize`."""

    rules: Mapping[str, Mapping[str, Any]]
    rest: Any
    """`keep`, `error`, or a scheme mapping."""
    statistics: str | None
    latent: str


class QuantizeStage(Stage):
    """Fit schemes to dense weights, each module by itself."""

    Config = QuantizeConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Resolve the rules; quantized modules and shapes a scheme can't take are problems."""
        view: ModelView = ctx.views["model"]
        owners = resolve_rules(ctx, ctx.config.rules, "rules", view)
        changed = _planned(ctx, view, owners)
        result = view.replace(changed)
        return Outcome(
            view=result,
            disk_bytes=disk_bytes(result),
            memory_bytes=fit_memory(result, changed),
            notes=notes(result, changed, owners) if changed else (),
        )

    def run(self, ctx: StageContext) -> None:
        """Fit module by module and write the model."""
        from torch.nn import Embedding

        from a1q.models.checkpoint import load_model, save_model
        from a1q.models.view import read_view
        from a1q.quant.embedding import QuantEmbedding
        from a1q.quant.linear import QuantLinear
        from a1q.quant.measure import error_by_group, relative_error, report_bits
        from a1q.quant.module import naming
        from a1q.quant.statistics import measured_modules, read_statistics
        from a1q.quant.tied import swap_module
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
        errors = []
        for step, (name, planned) in enumerate(changed.items(), 1):
            dense = model.get_submodule(name)
            assert planned.scheme is not None
            inputs = statistics.get(name)
            cls = QuantEmbedding if isinstance(dense, Embedding) else QuantLinear
            with naming(name):
                module = cls.quantize(dense, planned.scheme, inputs, ctx.seed, keep_latent=planned.latent)
            error = relative_error(dense.weight.detach(), module.dequantize(), inputs)
            errors.append((owners.get(name, "rest"), *error))
            swap_module(model, name, module)
            ctx.progress(step, len(changed))
        save_model(model, ctx.out, tokenizer_from=source.path)
        ctx.metrics.update(modules=len(changed), error=error_by_group(errors), **report_bits(ctx.out))


def _planned(ctx: PlanContext, view: ModelView, owners: Mapping[str, str]) -> dict[str, ModuleView]:
    """The modules that will be quantized, as they will be, in model order; problems go to `ctx`."""
    config: QuantizeConfig = ctx.config
    keep = config.latent == "keep"
    changed: dict[str, ModuleView] = {}
    for group in dict.fromkeys(owners.values()):
        modules = [view.modules[name] for name, owner in owners.items() if owner == group]
        taken = [module.name for module in modules if module.state != DENSE]
        if taken:
            ctx.recipe_problem(
                f"rules.{group}",
                f"{len(taken)} modules are already {view.modules[taken[0]].state}: {', '.join(summarize(taken))}",
                "`quantize` takes dense modules; `convert` changes the scheme of quantized ones",
            )
        else:
            wanted = [(module, config.rules[group], keep) for module in modules]
            changed |= planned_modules(ctx, f"rules.{group}", wanted)
    rest = [
        module
        for name, module in view.modules.items()
        if name not in owners and module.state == DENSE and module.kind == "linear"
    ]
    if config.rest == "error" and rest:
        named = ", ".join(summarize(module.name for module in rest))
        ctx.mismatch("rest", f"{len(rest)} linears are in no rule", named)
    elif isinstance(config.rest, Mapping):
        changed |= planned_modules(ctx, "rest", [(module, config.rest, keep) for module in rest])
    return {name: changed[name] for name in view.modules if name in changed}
