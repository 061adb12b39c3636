"""`train`: distill a quantized model against a cached teacher; weights, scales and tables train end to end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.errors import MismatchError
from a1q.quant.bits import disk_bytes
from a1q.quant.forms import check_form, form_bytes, form_note, set_form
from a1q.training.distillation import BatchConfig, Distillation, Objective
from a1q.training.freezing import check_freeze, still_snapped
from a1q.training.layers import LayerwiseConfig, planned_turns, turn_bytes, turns_note, turns_of
from a1q.training.parameters import NORMS
from a1q.training.planning import (
    activation_bytes,
    check_batch,
    check_teacher,
    checkpoint_note,
    kept_note,
    listed,
    online_bytes,
    quantized_targets,
    trained_count,
    weight_count,
)


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate of every parameter set, in the units of `a1q.training.parameters.parameter_groups`."""

    weights: float
    scales: float
    magnitudes: float
    lut: float
    norms: float


@dataclass(frozen=True)
class TrainConfig:
    """See schemas/stages/train.json."""

    objective: Objective
    teacher_model: Any
    steps: int
    batch: BatchConfig
    lr: LearningRates
    trainable: tuple[str, ...]
    groups: tuple[str, ...] | None
    warmup: int
    schedule: str
    final_lr: float
    clip: float | None
    weight_decay: float
    keep: str
    ema: float | None
    keep_every: int | None
    evaluate_every: int
    patience: int | None
    evaluate_sequences: int
    straight_through_fp16: bool
    recompute: bool
    layerwise: LayerwiseConfig | None
    form: str
    freeze: tuple[str, ...]


class TrainStage(Stage):
    """Quantization-aware distillation.

    With `weights` in `trainable`, every trained module has a latent weight from which its indices are derived anew
    in each forward pass; the artifact keeps it. Without, indices stand still and the latents of the trained modules
    are dropped: they would no longer agree with the trained scales. Modules that don't train keep theirs.

    With `layerwise` the decoder layers train one after the other (`a1q.training.layerwise`).
    """

    version = 6
    parallel = True
    Config = TrainConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Resolve the modules that train and predict memory and disk."""
        config, view = ctx.config, ctx.views["model"]
        if view is None:
            return Outcome()
        targets = quantized_targets(ctx, view, config.groups)
        check_teacher(ctx, config.objective, view)
        check_batch(ctx, config.batch)
        turns = planned_turns(ctx, view, targets) if config.layerwise and targets else {}
        if config.layerwise:
            targets = {name: module for modules in turns.values() for name, module in modules.items()}
        if not targets:
            return Outcome(view=view)
        count, weights = weight_count(targets.values()), "weights" in config.trainable
        check_freeze(ctx, config.freeze, config.trainable, targets)
        formed = check_form(ctx, config.form, targets)
        if formed and weights:
            message = f"`form: {config.form}` holds indices still, and weights train by moving them"
            ctx.recipe_problem("form", message, "take weights out of `trainable`, or leave `form` out")
        trained = trained_count(targets.values(), config.trainable)
        if not trained and NORMS not in config.trainable:
            sets = ", ".join(config.trainable)
            ctx.recipe_problem("trainable", f"there is nothing to train: these modules' schemes have no {sets}")
        # per trained weight: the quantized weight and its gradient; with a latent also itself, its gradient, two
        # moments and the best so far
        memory = 4 * view.parameters + (turn_bytes(turns.values(), config) if turns else count * (28 if weights else 8))
        memory += 4 * trained * (config.ema is not None)
        memory += online_bytes(view, config.objective, config.batch, ctx.views.get("teacher"))
        memory += activation_bytes(view, config.batch, ctx.views.get("teacher"), config.recompute)
        steps = config.steps * (len(turns) or 1)
        tokens = config.batch.sequences * (ctx.views.get("teacher") or {}).get("seq_len", 0)
        memory += form_bytes(config.form, formed.values(), tokens, trains=True)
        changed = {
            name: dataclasses.replace(
                module,
                latent=weights,
                snapped_sets=still_snapped(module.snapped_sets, config.trainable, config.freeze),
            )
            for name, module in targets.items()
        }
        view = view.replace(changed)
        return Outcome(
            view=view,
            disk_bytes=disk_bytes(view) * (1 + (steps // config.keep_every if config.keep_every else 0)),
            memory_bytes=memory,
            notes=(
                f"trains {', '.join(config.trainable)} of {len(targets)} modules",
                *listed(targets),
                *kept_note(config.objective, config.keep),
                *form_note(config.form, formed),
                *(turns_note(turns, config) if turns else [checkpoint_note(trained, config.ema is not None)]),
            ),
        )

    def run(self, ctx: StageContext) -> None:
        """Train, keep the best, write the model; metrics: held-out KL before and of what is kept, losses, speed.

        Raises:
            StageError: if too many steps in a row are not finite, or nothing is left to train.
            MismatchError: if a checkpoint of another machine or thread count stands in the way.
            Interrupted: at SIGINT or SIGTERM, after a checkpoint.
        """
        from a1q.models.checkpoint import save_model
        from a1q.training.device import recompute_layers
        from a1q.training.kept import KeptSteps
        from a1q.training.layerwise import train_layers
        from a1q.training.loop import LoopSpec, run_loop
        from a1q.training.memory import told_what_to_lower
        from a1q.training.parameters import latents, parameter_groups, select_modules, set_aside_latents

        config, source, teacher = ctx.config, ctx.inputs["model"], ctx.inputs["teacher"]
        assert source is not None and teacher is not None
        split = ctx.runtime.shard and not ctx.world.alone and config.layerwise is None
        if config.keep_every and split:
            raise MismatchError("`keep_every` writes whole models, and `runtime.shard` splits them: leave one out")
        objective, modules = Distillation.begin(ctx)
        model = objective.model
        chosen = select_modules(modules, ctx.groups, config.groups)
        if config.layerwise:
            turns = turns_of(model, chosen, config)
            chosen = {name: module for turn in turns for name, module in turn.modules.items()}
        weights = "weights" in config.trainable
        still = [name for name in modules if name not in chosen or not weights or config.layerwise]
        aside = set_aside_latents({name: modules[name] for name in still})
        if weights and not config.layerwise:
            for module in chosen.values():
                if module.latent is None:
                    module.start_latent()
        elif not weights and aside.keys() & chosen.keys():
            ctx.log("weights don't train here: latents are dropped, indices stay as they are")
        for module in chosen.values():
            module.snapped_sets = still_snapped(module.snapped_sets, config.trainable, config.freeze)
        set_form(config.form, chosen.values())
        model.train()
        if config.recompute:
            recompute_layers(model)

        def save(folder: Path) -> None:
            kept_aside = [name for name in aside if weights or name not in chosen]
            for name in kept_aside:
                modules[name].start_latent(aside[name])
            save_model(model, folder, tokenizer_from=source.path)
            for name in kept_aside:
                modules[name].drop_latent()

        kept, batch = KeptSteps(ctx.scratch, save), config.batch
        less = "what trains: without `weights` in `trainable` a quarter of the memory is enough"
        identity = {"model": source.digest, "teacher": teacher.digest}
        with told_what_to_lower(batch.sequences, batch.accumulate, objective.cache.seq_len, less, config.recompute):
            if config.layerwise:
                result = train_layers(ctx, turns, objective, aside, kept.keep, identity)
            else:
                rates = vars(config.lr)
                groups, state = parameter_groups(model, chosen.values(), config.trainable, rates, freeze=config.freeze)
                together = objective.over(ctx.world, ctx.smoke, state, latents(state) if split else ())
                groups, state = together.moved(groups, state)
                result = run_loop(
                    ctx,
                    parameter_groups=groups,
                    loss_of=objective.loss_of,
                    evaluate=objective.held_out(),
                    spec=LoopSpec.of(config, ctx.seed),
                    state=state,
                    identity=identity,
                    together=together,
                    keep_step=kept.keep,
                )
                together.end()
        if not ctx.world.leads:
            return
        save(ctx.out)
        kept.publish(ctx.out)
        after = result.last_tune if config.keep == "last" else result.best_tune
        if after is not None:
            ctx.metrics.update(kl_before=result.start_tune, kl_after=after)
        ctx.metrics.update({name: value for name, value in result.metrics().items() if not name.endswith("_tune")})
