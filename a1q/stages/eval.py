"""`eval`: perplexity, KL to the teacher, top-1 agreement and bits per weight on the test side, and gates on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1q.engine.artifact import Artifact
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.models.view import ModelView
from a1q.quant.bits import bpw, bpw_model
from a1q.quant.forms import check_form, form_bytes, form_note, set_form

OWN = ("ppl", "bpw", "bpw_model")
"""Metrics of the model alone."""
COMPARED = ("kl", "teacher_ppl", "top1")
"""Metrics that need a teacher."""
ORDER = 0
"""Seed of the order of the test documents: every stage and recipe reads the same text, so that figures compare."""


@dataclass(frozen=True)
class EvalConfig:
    """Options of `eval`."""

    data: str
    against: str | None
    teacher_model: Any
    sequences: int
    batch: int
    gate: Mapping[str, Mapping[str, float]]
    form: str


class EvalStage(Stage):
    """Measure a model; the figures are kept even when a gate fails."""

    version = 2
    Config = EvalConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Refuse gates that need a teacher where there is none; warn of those on bits that will fail."""
        config, view = ctx.config, ctx.views["model"]
        for name in config.gate:
            if name in COMPARED and config.against is None:
                message = f"a gate on {name} needs a teacher to compare with"
                ctx.recipe_problem(f"gate.{name}", message, "name the `kd` stage: `against: ID`")
        if view is None:
            return Outcome()
        formed = check_form(ctx, config.form, view.modules)
        bits = _bits_per_weight(view)
        length = ctx.data[config.data].config["seq_len"]
        models = 1 if config.against is None else 2
        logits = models * config.batch * length * view.config.get("vocab_size", 0)
        return Outcome(
            view={"metrics": [*OWN, *(COMPARED if config.against else ())]},
            disk_bytes=4096,
            memory_bytes=4 * (models * view.parameters + logits)
            + form_bytes(config.form, formed.values(), config.batch * length, trains=False),
            notes=(
                f"{config.sequences} sequences of {length} tokens",
                ", ".join(f"{name} {value:.3f}" for name, value in bits.items()),
                *form_note(config.form, formed),
                *(f"this gate will fail: {text}" for text in failed_gates(config.gate, bits).values()),
            ),
        )

    def run(self, ctx: StageContext) -> None:
        """Measure, judge, and write report.json."""
        from a1q.data import read_sequences
        from a1q.distill.evaluate import evaluate_model
        from a1q.models.checkpoint import load_model
        from a1q.models.view import read_view
        from a1q.quant.module import quantized_modules
        from a1q.training.device import prepare_torch

        device = prepare_torch(ctx.runtime, ctx.seed)
        config, entry, model = ctx.config, ctx.data[ctx.config.data], ctx.inputs["model"]
        assert model is not None
        teacher = _load_teacher(ctx, model, device)
        length = entry.config["seq_len"]
        text = read_sequences(entry.config, model.path, "test", length, config.sequences, ORDER)
        student = load_model(model.path, device=device)
        set_form(config.form, (module for _, module in quantized_modules(student)))
        found = evaluate_model(
            student,
            teacher,
            text.tokens,
            borders=text.borders,
            batch_size=config.batch,
            device=device,
            progress=lambda done, total: ctx.progress(done, total, tokens=done * length),
        )
        ctx.metrics.update(found, **_bits_per_weight(read_view(model.path)))
        ctx.meta["failed_gates"] = list(failed_gates(config.gate, ctx.metrics).values())
        report = {
            "metrics": ctx.metrics,
            "gate": {name: dict(bound) for name, bound in config.gate.items()},
            "failed_gates": ctx.meta["failed_gates"],
            "model": model.digest,
            "data": {"name": entry.name, "digest": entry.digest, "split": "test"},
        }
        (ctx.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True), encoding="utf-8")


def failed_gates(gates: Mapping[str, Mapping[str, float]], metrics: Mapping[str, float]) -> dict[str, str]:
    """Metric -> what is wrong with it, for each gate on a metric that is there; NaN fails every bound."""
    failed = {}
    for name, bound in gates.items():
        value = metrics.get(name)
        if value is None:
            continue
        if "max" in bound and not value <= bound["max"]:
            failed[name] = f"{name} is {value:.6g}, above its max of {bound['max']:g}"
        elif "min" in bound and not value >= bound["min"]:
            failed[name] = f"{name} is {value:.6g}, below its min of {bound['min']:g}"
    return failed


def _bits_per_weight(view: ModelView) -> dict[str, float]:
    return {"bpw": bpw(view), "bpw_model": bpw_model(view)}


def _load_teacher(ctx: StageContext, model: Artifact, device: Any) -> Any:
    """The model behind the cache of `against`, or None.

    Raises:
        MismatchError: if it isn't found unchanged, or `model` has another tokenizer or chat template.
    """
    from a1q.distill.teacher_model import load_teacher
    from a1q.distill.tokenizers import require_cache_of

    cache = ctx.inputs.get("teacher")
    if cache is None:
        return None
    require_cache_of(model.path, cache.meta, f"stages.{ctx.id}.against")
    return load_teacher(cache, ctx.inputs.get("teacher_model"), device)
