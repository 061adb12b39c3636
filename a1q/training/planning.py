"""What the stages that train say while planning: which modules, whether the teacher serves, how much they need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from a1q.distill.losses import ASSISTANT, tail_problem
from a1q.engine.matching import resolve_rules, summarize
from a1q.engine.stage import PlanContext
from a1q.models.view import DENSE, QUANTIZED, SNAPPED, ModelView, ModuleView
from a1q.quant.build import make_scheme
from a1q.training.checkpoint import KEPT
from a1q.training.distillation import BatchConfig, Objective, stream_problem
from a1q.training.width import tiled


def quantized_targets(ctx: PlanContext, view: ModelView, groups: Sequence[str] | None) -> dict[str, ModuleView]:
    """The quantized modules that `groups` name (all of them for None); problems are recorded in `ctx`."""
    if not any(module.state == QUANTIZED for module in view.modules.values()):
        if any(module.state == SNAPPED for module in view.modules.values()):
            ctx.recipe_problem(
                "", "the model here is snapped, and snapped modules no longer train", "put it before `snap`"
            )
        else:
            ctx.recipe_problem("", "no module of the model here is quantized", "put a `quantize` stage before it")
        return {}
    if groups is None:
        found = {name: module for name, module in view.modules.items() if module.state == QUANTIZED}
    else:
        found = {name: view.modules[name] for name in resolve_rules(ctx, groups, "groups", view)}
    for state, remedy in ((DENSE, "quantize them before"), (SNAPPED, "snapped modules no longer train")):
        wrong = [name for name, module in found.items() if module.state == state]
        if wrong:
            message = f"{len(wrong)} modules are {state}, not quantized: {', '.join(summarize(wrong))}"
            ctx.recipe_problem("groups", message, remedy)
    adapted = [name for name, module in found.items() if module.adapter]
    if adapted:
        message = f"{len(adapted)} modules hold an unmerged adapter: {', '.join(summarize(adapted))}"
        ctx.recipe_problem("", message, "use `merge: refit` in the lora_recover before, or put this stage first")
    return {name: module for name, module in found.items() if module.state == QUANTIZED and not module.adapter}


def check_teacher(ctx: PlanContext, objective: Objective, view: ModelView) -> None:
    """Record why the objective contradicts itself, or the planned teacher cache can't serve it and this student."""
    if not (objective.kl or objective.hard_top1 or objective.hard_full or objective.local):
        message = "every weight is 0, and there is nothing to minimize"
        ctx.recipe_problem("objective.kl", message, "put `hard_full: 1` beside it for the text's own next tokens")
    if objective.online and not objective.kl and not objective.local:
        message = "`kl` and `local` have no weight, and nothing else asks a teacher that runs along"
        ctx.recipe_problem("objective.online", message, "leave `online` out: the cache has the rest")
    if objective.online and objective.tail != "negatives":
        message = f"`tail: {objective.tail}` is about a cached teacher; online, the whole vocabulary counts"
        ctx.recipe_problem("objective.tail", message, "leave `tail` out")
    if not objective.kl and (objective.temperature != 1.0 or objective.tail != "negatives"):
        option = "temperature" if objective.temperature != 1.0 else "tail"
        ctx.recipe_problem(
            f"objective.{option}",
            f"`{option}` is about the divergence, which has no weight here",
            f"leave `{option}` out, or `kl: 0`",
        )
    if objective.targets == ASSISTANT and not (objective.kl or objective.hard_top1 or objective.hard_full):
        message = f"`targets: {ASSISTANT}` is about predictions, and `local` is about hidden states at every position"
        ctx.recipe_problem("objective.targets", message, "leave `targets` out")
    if objective.local and not objective.online:
        message = "the cache has no hidden states to compare with; they are those of a teacher that runs along"
        ctx.recipe_problem("objective.local", message, "put `online: true` beside it")
    teacher = ctx.views.get("teacher")
    if not teacher:
        return
    if objective.targets == ASSISTANT and teacher.get("chats") is False:
        message = f"`targets: {ASSISTANT}` is about conversations, and the data of `{objective.kd}` are plain text"
        ctx.recipe_problem("objective.targets", message, "data of `format: qa`, or `targets: all`")
    if objective.kl and not objective.online:
        rest = teacher.get("vocabulary", 0) - teacher.get("top_k", 0)
        known, negatives = teacher.get("temperatures", ()), teacher.get("random_negatives", 1)
        problem = tail_problem(objective.tail, objective.temperature, negatives, rest, known)
        if problem:
            remedy = "`random_negatives: 128`"
            if objective.tail == "bucket":
                remedy = f"`temperatures: [{objective.temperature:g}]`"
            ctx.recipe_problem("objective.tail", problem, f"put {remedy} into the `cache` of `kd`")
    if objective.online and objective.local and teacher.get("config"):
        problem = stream_problem(view.config, teacher["config"])
        if problem:
            ctx.mismatch("objective.local", f"hidden states are compared layer by layer, and {problem}")
    vocabulary, own = teacher.get("vocabulary"), view.config.get("vocab_size")
    if vocabulary and own and vocabulary != own:
        ctx.mismatch("objective.kd", f"the teacher's vocabulary is {vocabulary}, the student's {own}")


def kept_note(objective: Objective, keep: str) -> list[str]:
    """Say by what the best is chosen, where that isn't what training minimizes."""
    if objective.kl or keep != "best":
        return []
    return [
        "the best is kept by held-out KL, which this objective doesn't lower: `keep: last` takes what training made"
    ]


def check_batch(ctx: PlanContext, batch: BatchConfig) -> None:
    """Record a step that reads more sequences than the planned teacher cache has."""
    teacher = ctx.views.get("teacher") or {}
    there, asked = teacher.get("sequences"), batch.sequences * batch.accumulate
    if there is not None and asked > there:
        message = f"a step reads {batch.sequences} x {batch.accumulate} sequences, and the teacher cache has {there}"
        ctx.recipe_problem("batch.sequences", message, "lower it, or cache more (`kd: cache: {sequences: ...}`)")


def listed(names: Iterable[str]) -> list[str]:
    """Module names as indented lines of a plan's notes."""
    return [f"  {name}" for name in summarize(names)]


def checkpoint_note(trained: int, averaged: bool = False) -> str:
    """How much the checkpoints of `trained` parameters take, each with two moments, its best and average value; a new
    one is written beside the `KEPT` before."""
    return f"checkpoints take up to {(KEPT + 1) * (20 if averaged else 16) * trained / 1e6:,.1f} MB while it trains"


def weight_count(modules: Iterable[ModuleView]) -> int:
    """Number of weights in these modules."""
    return sum(module.shape[0] * module.shape[1] for module in modules)


def trained_count(modules: Iterable[ModuleView], sets: Sequence[str]) -> int:
    """Number of parameters of quantized modules that the named sets train."""
    total = 0
    for module in modules:
        assert module.scheme is not None
        scheme = make_scheme(module.scheme)
        shapes = scheme.part_shapes(module.shape)
        parts = {part for name in sets for part in scheme.trainable.get(name, ())}
        total += sum(math.prod(shapes[part]) for part in parts)
        total += weight_count([module]) if "weights" in sets else 0
    return total


def online_bytes(view: ModelView, objective: Objective, batch: BatchConfig, teacher: Any) -> int:
    """Rough bytes that a teacher adds which runs along, fp32: its parameters, the activations of one of its layers, its
    logits; with `local` the hidden states of both and their differences."""
    if not objective.online:
        return 0
    known, tokens = teacher or {}, batch.sequences * (teacher or {}).get("seq_len", 0)
    config = known.get("config") or view.config
    hidden, vocabulary = config.get("hidden_size", 0), view.config.get("vocab_size", 0)
    inside = 8 * hidden + 3 * config.get("intermediate_size", 0)
    # logits, probabilities and what is summed of both; or states alone
    head = hidden if not objective.kl or tiled(tokens, vocabulary) else 4 * vocabulary
    streams = 2 * config.get("num_hidden_layers", 0) * hidden if objective.local else 0
    return 4 * (known.get("parameters", view.parameters) + tokens * (inside + head + streams))


def activation_bytes(view: ModelView, batch: BatchConfig, teacher: Any, recompute: bool = False) -> int:
    """Rough bytes that one micro-batch keeps for its backward pass, fp32; with `recompute` of one layer at a time."""
    config, seq_len = view.config, (teacher or {}).get("seq_len", 0)
    tokens = batch.sequences * seq_len
    hidden, vocabulary = config.get("hidden_size", 0), config.get("vocab_size", 0)
    layers = config.get("num_hidden_layers", 0)
    per_layer = (
        16 * hidden + 6 * config.get("intermediate_size", 0) + 2 * config.get("num_attention_heads", 0) * seq_len
    )
    inside = layers * hidden + per_layer if recompute else layers * per_layer
    # logits, their gradient and the softmax on the way; or the states' gradients where they are made tile by tile
    head = 3 * hidden if tiled(tokens, vocabulary) else 3 * vocabulary
    return 4 * tokens * (inside + head)
