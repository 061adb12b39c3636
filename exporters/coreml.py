"""`coreml`: a stateful decoder package for the Neural Engine, palettized from the model's own indices and tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from a1q.coreml.architecture import FAMILIES, MAX_DIMENSION, head_parts, problems, read_architecture
from a1q.coreml.single import PACKAGE, STATE, Calls
from a1q.engine.artifact import Artifact
from a1q.engine.exporter import Exporter
from a1q.engine.stage import StageContext
from a1q.errors import StageError

if TYPE_CHECKING:
    from torch import nn

    from a1q.coreml.reader import Package
    from a1q.coreml.verify import Comparison

SCHEMES = ("lut", "lut_lowrank")
Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
SIZE_TOLERANCE = 0.03
"""How far the weight file may be from the theoretical size."""
SIZE_SLACK = 65536
"""Bytes it may always be off: headers and alignment of entries, which weigh in tiny models only."""


@dataclass(frozen=True)
class Verify:
    """How the package is compared with the PyTorch model, and what it must reach."""

    prompt: int
    generate: int
    min_cosine: float
    min_cosine_fp16: float
    min_agreement: float


@dataclass(frozen=True)
class CoremlConfig:
    """See schemas/exporters/coreml.json."""

    layout: str
    context: int
    prefill: int
    verify: Verify | None


class CoremlExporter(Exporter):
    """Build the package, read it back, interpret it and compare."""

    Config = CoremlConfig

    def refusals(self, view: Any, config: CoremlConfig) -> list[str]:
        """Model type, dimensions, states and schemes."""
        found = problems(view.config)
        if view.config.get("model_type") not in FAMILIES:
            return found  # nothing else can be said of it
        if config.context % config.prefill:
            found.append(f"context {config.context} is not a multiple of prefill {config.prefill}")
        if config.verify is not None and config.verify.prompt + config.verify.generate > config.context:
            found.append(
                f"verify: a prompt of {config.verify.prompt} and {config.verify.generate} generated tokens do not fit "
                f"a context of {config.context}"
            )
        modules = view.modules.values()
        found += _head_problems(view)
        unsnapped = [module.name for module in modules if module.state == "quantized"]
        if unsnapped:
            found.append(
                f"the coreml exporter takes snapped or dense modules; {_some(unsnapped)} still train: put a `snap` "
                "stage before the export"
            )
        foreign = [m.name for m in modules if m.scheme is not None and m.scheme["scheme"] not in SCHEMES]
        if foreign:
            found.append(f"the coreml exporter takes the schemes {', '.join(SCHEMES)}; {_some(foreign)} have another")
        tables = [m.name for m in modules if m.scheme is not None and m.kind == "embedding"]
        if tables:
            found.append(f"the coreml exporter takes dense embeddings; quantized: {_some(tables)}")
        return found

    def estimate(self, view: Any, config: CoremlConfig) -> int:
        """The weights in theory, and the program that holds them together."""
        return theoretical_bytes(view) + 100_000 + 200_000 * int(view.config.get("num_hidden_layers", 0))

    def export(self, model: Artifact, config: CoremlConfig, ctx: StageContext) -> None:
        """Write the package, the tokenizer's files and meta.json.

        Metrics: bytes, weight_bytes, theory_bytes, size_ratio, ops; with `verify` also, for fp32 and fp16,
        cosine_*, cosine_mean_*, max_error_*, kl_*, greedy_agreement_*, overflows_*, and positions.

        Raises:
            StageError: if a weight does not fit fp16, or the package read back is not what `verify` asks.
        """
        from a1q.coreml.layouts import Options
        from a1q.coreml.package import write_package
        from a1q.coreml.reader import read_package
        from a1q.coreml.single import build_program, outputs
        from a1q.coreml.weights import decoder_weights
        from a1q.models.checkpoint import copy_companions, load_model
        from a1q.models.view import read_view

        view = read_view(model.path)
        architecture = read_architecture(view.config)
        loaded = load_model(model.path)
        weights = decoder_weights(loaded)
        options = Options(config.context, config.prefill)
        layout = Calls(config.prefill, outputs(architecture, weights, options))
        ctx.log(f"writing {PACKAGE}: {architecture.layers} layers, context {config.context}")
        built, total = itertools.count(1), 2 * architecture.layers
        program = build_program(architecture, weights, options, lambda: ctx.progress(next(built), total))
        write_package(program, ctx.out / PACKAGE)
        del program, weights
        copy_companions(model.path, ctx.out)
        package = read_package(ctx.out / PACKAGE)
        (ctx.out / "meta.json").write_text(json.dumps(_meta(view, config, layout), indent=2) + "\n", encoding="utf-8")
        self._measure_size(view, package, ctx)
        if config.verify is not None:
            self._verify(loaded, model.path, package, layout, config.verify, ctx)

    def _measure_size(self, view: Any, package: Package, ctx: StageContext) -> None:
        theory = theoretical_bytes(view)
        ctx.metrics.update(
            bytes=sum(path.stat().st_size for path in ctx.out.rglob("*") if path.is_file()),
            weight_bytes=package.weight_bytes,
            theory_bytes=theory,
            size_ratio=package.weight_bytes / theory,
            ops=dict(sorted(package.operations.items())),
        )

    def _verify(
        self, model: nn.Module, folder: Path, package: Package, layout: Calls, wanted: Verify, ctx: StageContext
    ) -> None:
        """Compare the package as read back with the PyTorch model."""
        from a1q.coreml.verify import compare, prompt_tokens, reference_run

        vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        reference = reference_run(model, prompt_tokens(folder, vocabulary, wanted.prompt), wanted.generate)
        total = 2 * (2 * len(reference.tokens) - reference.prompt + -(-reference.prompt // layout.chunk))
        calls = itertools.count(1)
        comparisons = {
            precision: compare(package.program, layout, reference, precision, lambda: ctx.progress(next(calls), total))
            for precision in PRECISIONS
        }
        ctx.metrics["positions"] = len(reference.tokens)
        for precision, comparison in comparisons.items():
            ctx.metrics.update({f"{name}_{precision}": value for name, value in asdict(comparison).items()})
        failures = _failures(comparisons, ctx.metrics, wanted)
        if failures:
            raise StageError("the Core ML package is not what the model is: " + "; ".join(failures))


def theoretical_bytes(view: Any) -> int:
    """Bytes of the weights: quantized modules at the bits of their scheme, everything else in fp16.

    A tied head is stored once.
    """
    from a1q.quant.bits import module_bits

    quantized = [module for module in view.modules.values() if module.scheme is not None]
    dense = view.parameters - sum(module.shape[0] * module.shape[1] for module in quantized)
    return 2 * dense + sum(module_bits(module) for module in quantized) // 8


def _failures(found: Mapping[Precision, Comparison], metrics: Mapping[str, Any], wanted: Verify) -> list[str]:
    """What of `wanted` was not reached."""
    fp32, fp16 = found["fp32"], found["fp16"]
    failures = []
    for name, value, least in (
        ("cosine in fp32", fp32.cosine, wanted.min_cosine),
        ("cosine in fp16", fp16.cosine, wanted.min_cosine_fp16),
        ("share of equal greedy tokens in fp32", fp32.greedy_agreement, wanted.min_agreement),
    ):
        if not value >= least:
            failures.append(f"{name} is {value:.8f}, wanted at least {least}")
    for precision, comparison in found.items():
        if comparison.overflows:
            failures.append(
                f"{comparison.overflows} numbers are not finite in {precision}, the first in {comparison.overflow_at}"
            )
    excess = metrics["weight_bytes"] - metrics["theory_bytes"]
    if abs(excess) > max(SIZE_TOLERANCE * metrics["theory_bytes"], SIZE_SLACK):
        failures.append(
            f"the weight file has {metrics['weight_bytes']:,} bytes where its bits say {metrics['theory_bytes']:,}"
        )
    return failures


def _meta(view: Any, config: CoremlConfig, layout: Calls) -> dict[str, Any]:
    """What a program that loads the package needs to know."""
    quantized = {m.name: dict(m.scheme) for m in view.modules.values() if m.scheme is not None}
    return {
        "format": 1,
        "package": PACKAGE,
        "layout": config.layout,
        "model_type": view.config["model_type"],
        "context": config.context,
        "functions": {"infer": 1, "prefill": layout.chunk},
        "outputs": layout.outputs,
        "state": STATE,
        "vocabulary": view.config["vocab_size"],
        "eos_token_id": view.config.get("eos_token_id"),
        "schemes": quantized,
    }


def _head_problems(view: Any) -> list[str]:
    """Whether the head can be cut into parts that the Neural Engine takes."""
    vocabulary = int(view.config["vocab_size"])
    head = view.modules.get("lm_head")
    grouped = head is not None and head.scheme is not None and head.scheme.get("granularity") == "group"
    step = int(head.scheme["channels"]) if grouped else 1
    if head_parts(vocabulary, step):
        return []
    tables = f" of whole groups of {step} channels" if step > 1 else ""
    return [f"a head of {vocabulary} rows can't be cut into equal parts{tables} of at most {MAX_DIMENSION} rows"]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
