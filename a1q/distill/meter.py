"""KL to the teacher as stages that change a model without training it report it: before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from a1q.engine.stage import StageContext


def kl_meter(ctx: StageContext, device: Any) -> Callable[[Any], float] | None:
    """A function model -> KL to the teacher on the cache's held-out part, in nats per token.

    `ctx.config` has `kl_sequences`, and `ctx.inputs` the model, optionally `teacher` and `teacher_model`. None where
    there is no teacher, its cache has no held-out part, or no sequence is asked for.

    Raises:
        MismatchError: if the model has another tokenizer or chat template, or the teacher isn't found unchanged.
    """
    import numpy

    from a1q.distill.cache import TeacherCache
    from a1q.distill.evaluate import evaluate_model
    from a1q.distill.teacher_model import load_teacher
    from a1q.distill.tokenizers import require_cache_of

    artifact, model = ctx.inputs.get("teacher"), ctx.inputs["model"]
    if artifact is None or ctx.config.kl_sequences == 0:
        return None
    assert model is not None
    cache = TeacherCache(artifact.path)
    require_cache_of(model.path, cache.meta, f"stages.{ctx.id}.teacher")
    count = min(ctx.config.kl_sequences, cache.size("tune"))
    if count == 0:
        return None
    text = cache.batch(numpy.arange(count), "tune")
    tokens, borders = text.tokens.numpy(), None if text.borders is None else text.borders.numpy()
    teacher = load_teacher(artifact, ctx.inputs.get("teacher_model"), device)

    def measure(model: Any) -> float:
        return evaluate_model(model, teacher, tokens, borders=borders, device=device, progress=ctx.progress)["kl"]

    return measure
