"""`lora_recover`: win back quality with LoRA adapters, then merge them by a new fit or keep them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.matching import summarize
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.errors import StageError
from a1q.models.view import DENSE, PREPARED
from a1q.quant.bits import disk_bytes
from a1q.quant.planning import check_statistics
from a1q.training.distillation import BatchConfig, Distillation, Objective
from a1q.training.planning import (
    activation_bytes,
    check_batch,
    check_teacher,
    checkpoint_note,
    kept_note,
    listed,
    online_bytes,
    quantized_targets,
    weight_count,
)

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.models.view import ModuleView
    from a1q.quant.module import QuantModule


@dataclass(frozen=True)
class LoraRecoverConfig:
    """See schemas/stages/lora_recover.json."""

    statistics: str | None
    objective: Objective
    teacher_model: Any
    rank: int
    alpha: float | None
    dropout: float
    groups: tuple[str, ...] | None
    start: str
    adapter: Any
    merge: str
    steps: int
    lr: float
    refit_steps: int
    refit_lr: float
    refit_weights: float | None
    batch: BatchConfig
    warmup: int
    schedule: str
    final_lr: float
    clip: float | None
    weight_decay: float
    keep: str
    evaluate_every: int
    evaluate_sequences: int
    straight_through_fp16: bool


UNJUDGED = "the teacher cache has no held-out part to judge a recovery by"


class LoraRecoverStage(Stage):
    """Adapters are plain PEFT around the quantized linears, whose own parameters are frozen while gradients pass.

    Metrics are held-out KL in nats per token: `kl_before`, `kl_start` of adapters that begin with something,
    `kl_adapter`, and for `merge: refit` `kl_merged`, `kl_refit` and `kept`: `refit`, or `before` where the recovery did
    no good and the model stays as it was.
    """

    version = 6
    parallel = True
    Config = LoraRecoverConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Resolve the modules that get an adapter and predict memory and disk."""
        config, view = ctx.config, ctx.views["model"]
        if view is None:
            return Outcome()
        found = quantized_targets(ctx, view, config.groups)
        targets = {name: module for name, module in found.items() if module.kind == "linear"}
        embeddings = [name for name in found if name not in targets]
        if config.groups is not None and embeddings:
            message = f"{', '.join(embeddings)}: an embedding, and adapters are for linears"
            ctx.mismatch("groups", message, "`train` takes embeddings; narrow the groups here to linears")
        elif embeddings and not targets:
            ctx.mismatch("", "only embeddings are quantized here, and adapters are for linears", "quantize linears too")
        check_teacher(ctx, config.objective, view)
        check_batch(ctx, config.batch)
        _check_judge(ctx)
        _check_merge(ctx)
        if config.merge == "refit" or config.start == "error":
            check_statistics(ctx)
        if not targets:
            return Outcome(view=view)
        sizes = [module.shape for module in targets.values()]
        too_small = [name for name, module in targets.items() if config.rank > min(module.shape)]
        if too_small:
            ctx.mismatch("rank", f"rank {config.rank} is more than a side of {', '.join(summarize(too_small))}")
        if config.adapter is not None:
            _check_adapter(ctx, targets)
        elif config.start == "error":
            _check_dense(ctx, targets)
        adapters = config.rank * sum(rows + columns for rows, columns in sizes)
        if config.merge == "adapter":
            changed = {name: dataclasses.replace(item, adapter=config.rank) for name, item in targets.items()}
            view, kept = view.replace(changed), 4 * adapters  # once more as a PEFT folder
        else:
            kept = 0
            weights = config.refit_weights is not None
            changed = {
                name: dataclasses.replace(item, snapped_sets=(), latent=item.latent or weights)
                for name, item in targets.items()
            }
            view = view.replace(changed)
        # frozen quantized weights, kept for the backward pass; adapters with gradient, moments and best; the latents
        memory = 4 * view.parameters + 8 * weight_count(targets.values()) + 20 * adapters
        if config.merge == "refit" and config.refit_weights is not None:
            memory += 20 * weight_count(targets.values())
        if config.start == "error":
            memory += 4 * view.parameters  # the model that was quantized, once more
        memory += online_bytes(view, config.objective, config.batch, ctx.views.get("teacher"))
        memory += activation_bytes(view, config.batch, ctx.views.get("teacher"))
        return Outcome(
            view=view,
            disk_bytes=disk_bytes(view) + kept,
            memory_bytes=memory,
            notes=(
                f"rank {config.rank} on {len(targets)} modules",
                *listed(targets),
                *kept_note(config.objective, config.keep),
                *(f"  {name} gets none: it is an embedding" for name in embeddings),
                checkpoint_note(adapters),
            ),
        )

    def run(self, ctx: StageContext) -> None:
        """Train adapters, then refit or keep them.

        Raises:
            StageError, MismatchError, Interrupted: as `train`.
        """
        from a1q.models.checkpoint import load_model, save_model
        from a1q.quant.module import quantized_modules
        from a1q.training.adapters import save_peft_adapter
        from a1q.training.memory import told_what_to_lower
        from a1q.training.parameters import select_modules, set_aside_latents

        config, source, teacher = ctx.config, ctx.inputs["model"], ctx.inputs["teacher"]
        assert source is not None and teacher is not None
        objective, modules = Distillation.begin(ctx)
        if objective.held_out() is None:
            raise StageError(UNJUDGED)
        selected = select_modules(modules, ctx.groups, config.groups)
        chosen = {name: module for name, module in selected.items() if module.kind == "linear"}
        latents = set_aside_latents(modules)
        identity = {"model": source.digest, "teacher": teacher.digest}
        smaller = f"`rank` from {config.rank} to {max(config.rank // 2, 1)}"
        with told_what_to_lower(config.batch.sequences, config.batch.accumulate, objective.cache.seq_len, smaller):
            _train_adapters(ctx, objective, chosen, identity, _start(ctx, chosen))
            helped = config.merge != "refit" or _refit(ctx, objective, chosen, latents, identity)
        if not ctx.world.leads:
            return
        if not helped:
            unchanged = load_model(source.path)
            if config.refit_weights is not None:  # as planned: what follows may count on latents
                for name, module in quantized_modules(unchanged):
                    if name in chosen and module.latent is None:
                        module.start_latent()
            save_model(unchanged, ctx.out, tokenizer_from=source.path)
            return
        for name, latent in latents.items():
            if modules[name].latent is None:
                modules[name].start_latent(latent)
        save_model(objective.model, ctx.out, tokenizer_from=source.path)
        if config.merge == "adapter":
            save_peft_adapter(objective.model, ctx.out / "adapter")


def _check_judge(ctx: PlanContext) -> None:
    """Record that nothing is held out."""
    if (ctx.views.get("teacher") or {}).get("tune_sequences") == 0:
        ctx.recipe_problem("objective.kd", UNJUDGED, "`tune_sequences: 32` in the `cache` of `kd`")


def _check_merge(ctx: PlanContext) -> None:
    """Record a rate for weights that never move."""
    config = ctx.config
    if config.refit_weights is None:
        return
    if config.merge == "adapter":
        ctx.recipe_problem("refit_weights", "`merge: adapter` merges nothing", "leave `refit_weights` out")
    elif not config.refit_steps:
        ctx.recipe_problem("refit_weights", "`refit_steps` is 0, so that nothing trains after the merge", "raise it")


def _check_dense(ctx: PlanContext, targets: Mapping[str, ModuleView]) -> None:
    """Record why the model that the modules were quantized from isn't the one at hand."""
    view, dense = ctx.views["model"], ctx.views.get("teacher_model")
    if dense is None:
        ctx.recipe_problem("start", "`start: error` asks what quantizing lost, and there is no model to compare with")
        return
    if list(dense.config.get(PREPARED, ())) != list(view.config.get(PREPARED, ())):
        message = "`start: error` compares weights with the recipe's model, and `prepare` rewrote those here"
        ctx.recipe_problem("start", message, "leave `start` out")
        return
    quantized = [name for name in targets if name in dense.modules and dense.modules[name].state != DENSE]
    if quantized:
        message = f"the model compared with is quantized itself: {', '.join(summarize(quantized))}"
        ctx.mismatch("start", message, "`teacher_model` has to name the model that was quantized")
        return
    odd = [
        name for name, item in targets.items() if name not in dense.modules or dense.modules[name].shape != item.shape
    ]
    if odd:
        message = f"the model compared with has other shapes: {', '.join(summarize(odd))}"
        ctx.mismatch("start", message, "`teacher_model` has to name the model that was quantized")


def _check_adapter(ctx: PlanContext, targets: Mapping[str, ModuleView]) -> None:
    """Record why the adapter that training goes on from doesn't fit these modules."""
    config, found = ctx.config, ctx.views["adapter"]
    if config.start != "random":
        ctx.recipe_problem("start", "`adapter` says what adapters begin with; so does `start`", "leave one out")
    more, less = [name for name in found if name not in targets], [name for name in targets if name not in found]
    if more:
        message = f"the adapter has {len(more)} modules that don't train here: {', '.join(summarize(more))}"
        ctx.mismatch("adapter.source", message, "`groups` has to name those of the adapter")
    if less:
        message = f"the adapter has nothing for {len(less)} modules: {', '.join(summarize(less))}"
        ctx.mismatch("adapter.source", message, "`groups` has to name those of the adapter")
    both = {name: (found[name], item) for name, item in targets.items() if name in found}
    wrong = [name for name, (adapter, item) in both.items() if adapter.shape != item.shape]
    if wrong:
        name = wrong[0]
        message = f"the adapter of {', '.join(summarize(wrong))} has another shape"
        ctx.mismatch("adapter.source", f"{message}: {both[name][0].shape}, and {name} has {both[name][1].shape}")
    other = [name for name, (adapter, _) in both.items() if adapter.rank != config.rank]
    if other and not wrong:
        rank = both[other[0]][0].rank
        message = f"`rank` is {config.rank}, and the adapter has {rank} in {', '.join(summarize(other))}"
        ctx.mismatch("rank", message, f"put `rank: {rank}`" if len(other) == len(both) else "one rank for all")


def _start(ctx: StageContext, chosen: Mapping[str, QuantModule]) -> dict[str, tuple[Tensor, Tensor]]:
    """What the adapters begin with, by module; nothing where they begin at random."""
    adapter = ctx.inputs.get("adapter")
    if adapter is not None:
        from a1q.models.adapter_source import read_adapter

        return read_adapter(adapter.path)
    if ctx.config.start != "error":
        return {}
    from a1q.models.checkpoint import load_model
    from a1q.quant.statistics import read_statistics
    from a1q.training.adapter_start import error_adapters

    dense = ctx.inputs["teacher_model"]
    assert dense is not None
    statistics = read_statistics(ctx.inputs.get("statistics"), chosen)
    return error_adapters(chosen, load_model(dense.path), statistics, ctx.config.rank, ctx.progress)


def _train_adapters(
    ctx: StageContext,
    objective: Distillation,
    chosen: Mapping[str, QuantModule],
    identity: Mapping[str, Any],
    start: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Train adapters with PEFT and leave them in the modules' own slots."""
    import torch

    from a1q.training.adapters import adapter_tensors, attach_adapters, fill_adapters
    from a1q.training.loop import LoopSpec, run_loop

    config = ctx.config
    alpha = float(config.alpha or config.rank)
    torch.manual_seed(ctx.seed)  # A starts at random
    before = objective.evaluate() if start else None
    wrapped = attach_adapters(objective.model, chosen, config.rank, alpha, config.dropout)
    if start:
        fill_adapters(wrapped, start)
    state = {name: item for name, item in wrapped.named_parameters() if item.requires_grad}
    wrapped.train()
    result = run_loop(
        ctx,
        parameter_groups=[{"name": "adapters", "params": list(state.values()), "lr": config.lr}],
        loss_of=objective.loss_of,
        evaluate=objective.evaluate,
        spec=LoopSpec.of(config, ctx.seed, name="adapter", steps=config.steps),
        state=state,
        identity=identity,
        together=objective.over(ctx.world, ctx.smoke),
    )
    trained = adapter_tensors(wrapped)
    wrapped.unload()
    after = result.last_tune if config.keep == "last" else result.best_tune
    assert after is not None
    kept_step = result.kept_step
    if config.start == "error" and config.keep == "best" and before is not None and not after < before:
        ctx.log(
            f"WARNING: adapters that began with what quantizing lost did no good: held-out KL {before:.5g} before, "
            f"{after:.5g} after; they are nothing now. `start: random` or more steps may help."
        )
        trained = {name: (a, torch.zeros_like(b)) for name, (a, b) in trained.items()}
        after, kept_step = before, 0
    for name, module in chosen.items():
        module.set_adapter(*trained[name], alpha)
    ctx.metrics.update(
        kl_before=result.start_tune if before is None else before,
        kl_adapter=after,
        adapter_step=kept_step,
        tokens_per_second=result.tokens_per_second,
    )
    if start:
        ctx.metrics["kl_start"] = result.start_tune


def _refit(
    ctx: StageContext,
    objective: Distillation,
    chosen: Mapping[str, QuantModule],
    latents: Mapping[str, Tensor],
    identity: Mapping[str, Any],
) -> bool:
    """Merge the adapters into the modules by a new fit and train scales and tables; return whether it helped."""
    from a1q.quant.module import fit_parts, latent_for, naming
    from a1q.quant.statistics import read_statistics
    from a1q.training.loop import LoopSpec, run_loop
    from a1q.training.parameters import parameter_groups

    config, before = ctx.config, ctx.metrics["kl_before"]
    statistics = read_statistics(ctx.inputs.get("statistics"), chosen)
    starts: dict[str, dict[str, Any]] = {"assign": {}, "fit": {}}
    targets = {}
    for step, (name, module) in enumerate(chosen.items(), 1):
        # The latent holds what the indices were rounded from: a small change moves indices there, where on the grid
        # itself it would round back to the same ones.
        base = latents[name] if name in latents else module.dequantize()
        target = targets[name] = base + module.adapter_delta()
        parts = {part: tensor.detach().clone() for part, tensor in module.parts().items()}
        starts["assign"][name] = {**parts, "indices": module.scheme.assign(parts, target)}
        with naming(name):
            inputs = statistics.inputs(name) if statistics else None
            starts["fit"][name] = fit_parts(module.scheme, target, inputs, ctx.seed)
        module.drop_adapter()
        if name in latents or config.refit_weights is not None:
            module.start_latent(target)
        ctx.progress(step, len(chosen))

    def put(parts_of: Mapping[str, Any]) -> None:
        for name, module in chosen.items():
            latent = latent_for(module.scheme, parts_of[name], targets[name])
            module.replace_parts(parts_of[name], latent)

    measured = {}
    for start, parts_of in starts.items():
        put(parts_of)
        measured[start] = objective.evaluate()
    best = min(measured, key=lambda start: measured[start])
    put(starts[best])
    ctx.metrics.update(kl_merged=measured[best], merge_start=best)
    after = measured[best]
    if config.refit_steps:
        rates = {"scales": config.refit_lr, "lut": config.refit_lr}
        if config.refit_weights is not None:
            rates["weights"] = config.refit_weights
        groups, state = parameter_groups(objective.model, chosen.values(), rates, rates)
        objective.model.train()
        result = run_loop(
            ctx,
            parameter_groups=groups,
            loss_of=objective.loss_of,
            evaluate=objective.evaluate,
            spec=LoopSpec.of(config, ctx.seed, name="refit", steps=config.refit_steps),
            state=state,
            identity=identity,
            together=objective.over(ctx.world, ctx.smoke),
        )
        found = result.last_tune if config.keep == "last" else result.best_tune
        assert found is not None
        after = ctx.metrics["kl_refit"] = found
    helped = after < before or config.keep == "last"
    ctx.metrics["kept"] = "refit" if helped else "before"
    if not helped:
        ctx.log(
            f"WARNING: merging the adapters did no good: held-out KL {before:.5g} before, {after:.5g} after; "
            "the model stays as it was. More steps, a higher rank or `merge: adapter` may help."
        )
    return helped
