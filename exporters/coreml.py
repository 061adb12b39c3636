"""`coreml`: stateful decoder packages for the Neural Engine, palettized from the model's own indices and tables."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.coreml import repalettize
from a1q.coreml.architecture import Architecture, problems, read_architecture
from a1q.coreml.layouts import Layout, Options, Part, get_layout
from a1q.coreml.thresholds import Verify
from a1q.engine.artifact import Artifact
from a1q.engine.exporter import Exporter
from a1q.engine.stage import StageContext
from a1q.errors import StageError

if TYPE_CHECKING:
    from torch import nn

    from a1q.coreml.bundle import Bundle
    from a1q.coreml.reference import Reference, Tokens
    from a1q.coreml.weights import DecoderWeights

MEASURED = 256
"""Tokens of text over which activations are measured."""
SIZE_TOLERANCE = 0.01
"""How far a weight file may be from its theoretical size."""
SIZE_SLACK = 65536
"""Bytes it may always be off: headers and alignment of entries, which weigh in tiny models only."""


@dataclass(frozen=True)
class CoremlConfig:
    """See schemas/exporters/coreml.json."""

    layout: str
    context: int
    prefill: int
    chunks: int | None
    head_parts: int | None
    name: str | None
    adapters: str
    repalettize: Mapping[str, Mapping[str, Any]]
    residual_scale: float | str
    verify: Verify | None


class CoremlExporter(Exporter):
    """Build the packages, read them back, interpret them and compare."""

    version = 3
    Config = CoremlConfig

    def refusals(self, view: Any, config: CoremlConfig) -> list[str]:
        """Model type, dimensions, states, schemes and what the layout can't hold."""
        found = problems(view.config)
        if found:
            return found  # nothing else can be said of it
        found = repalettize.problems(config.repalettize, view)
        if found:
            return found
        view = repalettize.planned(config.repalettize, view)
        if config.context % config.prefill:
            found.append(f"context {config.context} is not a multiple of prefill {config.prefill}")
        found += _verify_problems(config)
        found += get_layout(config.layout).problems(view.config, _options(view, config), _head_step(view))
        modules = view.modules.values()
        unsnapped = [module.name for module in modules if module.state == "quantized"]
        if unsnapped:
            found.append(
                f"the coreml exporter takes snapped or dense modules; {_some(unsnapped)} still train: put a `snap` "
                "stage before the export"
            )
        if config.adapters == "functions" and not any(module.adapter for module in modules):
            found.append("adapters: functions needs unmerged adapters (`lora_recover` with `merge: adapter`)")
        return found + _scheme_problems(view)

    def estimate(self, view: Any, config: CoremlConfig) -> int:
        """The weights in theory, and the programs that hold them together."""
        from a1q.quant.bits import bpw_model, module_bits

        view = repalettize.planned(config.repalettize, view)
        weights = int(bpw_model(view) * view.parameters / 8)
        if config.layout != "single" and view.tied:  # the head is a package of its own
            weights += module_bits(view.modules["model.embed_tokens"]) // 8
        return weights + 100_000 + 200_000 * int(view.config.get("num_hidden_layers", 0))

    def export(self, model: Artifact, config: CoremlConfig, ctx: StageContext) -> None:
        """Write the packages, the tokenizer's files and meta.json.

        Raises:
            StageError: if a weight does not fit fp16, or a package read back is not what `verify` asks.
        """
        from a1q.coreml.bundle import read_bundle
        from a1q.coreml.package import write_package
        from a1q.coreml.reference import references
        from a1q.coreml.weights import decoder_weights
        from a1q.models.checkpoint import copy_companions, load_model
        from a1q.models.view import read_view

        view = read_view(model.path)
        layout = get_layout(config.layout)
        loaded = load_model(model.path)
        architecture = read_architecture(loaded.config.to_dict())
        if config.repalettize:
            view = _repalettize(loaded, model, view, config, ctx)
        weights = decoder_weights(loaded)
        wanted = _tokens(model, architecture, config)
        expected = references(loaded, wanted)  # now, and the model goes: package and model at once are much memory
        # Behind the references, which wrote quantized modules out: each pass over the others makes all weights anew.
        options = _options(view, config, _residual_scale(loaded, model, config, ctx))
        del loaded
        parts = layout.parts(architecture, weights, options)
        outputs = layout.outputs(architecture, weights, options)
        ctx.log(f"writing {_packages(len(parts))}: {architecture.layers} layers, context {config.context}")
        calls = sum(len(part.functions) * (part.layers[1] - part.layers[0]) for part in parts)
        built = itertools.count(1)
        for part in parts:
            program = part.build(lambda: ctx.progress(next(built), calls))
            write_package(program, ctx.out / part.file)
            del program
        copy_companions(model.path, ctx.out)
        meta = _meta(view, config, options, layout, parts, outputs)
        (ctx.out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        layout.companions(ctx.out, meta, options)
        bundle = read_bundle(ctx.out)
        _measure(bundle, view, ctx)
        _lint(bundle, ctx)
        if config.verify is not None:
            _require_equal(bundle, weights)
        del weights
        if config.verify is not None:
            _verify(bundle, expected, config.verify, ctx)
            if options.adapter_functions:
                _verify_base(bundle, model, wanted, config.verify, ctx)


def _options(view: Any, config: CoremlConfig, residual_scale: float = 1.0) -> Options:
    return Options(
        context=config.context,
        prefill=config.prefill,
        head_parts=config.head_parts,
        chunks=config.chunks,
        adapter_functions=config.adapters == "functions",
        residual_scale=residual_scale,
        name=config.name or str(view.config["model_type"]),
    )


def _repalettize(model: nn.Module, source: Artifact, view: Any, config: CoremlConfig, ctx: StageContext) -> Any:
    """Fit the modules named anew, and say what it cost; returns the view of what `model` is now."""
    tokens = _text(source, model, config)
    loss = repalettize.repalettize(model, config.repalettize, view, tokens, ctx.progress)
    found = loss.as_json()
    ctx.metrics["repalettized"] = found
    ctx.log(
        f"{len(loss.modules)} modules fitted anew: {found['bytes_before']:,} -> {found['bytes_after']:,} bytes, "
        f"KL {loss.kl:.3g}, same first choice at {loss.agreement:.1%} of {loss.positions} positions"
    )
    return repalettize.planned(config.repalettize, view)


def _text(source: Artifact, model: nn.Module, config: CoremlConfig) -> Any:
    """A sequence of real text, integers [1, n], on which a model is measured."""
    import numpy as np

    from a1q.coreml.reference import prompt_tokens

    vocabulary, start = int(model.config.vocab_size), model.config.bos_token_id  # type: ignore[union-attr, arg-type]
    tokens = prompt_tokens(source.path, vocabulary, min(config.context, MEASURED))
    if isinstance(start, int) and tokens[0] != start:
        tokens = [start, *tokens[:-1]]  # where text begins so, its activations tend to be the largest
    return np.array([tokens])


def _residual_scale(model: nn.Module, source: Artifact, config: CoremlConfig, ctx: StageContext) -> float:
    """The factor asked for, or the one that the activations on text ask for; both are noted."""
    from a1q.coreml.activations import measure, residual_scale

    peaks = measure(model, _text(source, model, config))
    scale = residual_scale(peaks) if config.residual_scale == "auto" else float(config.residual_scale)
    ctx.metrics.update(peak_activation=peaks.stream(), residual_scale=scale, peaks=peaks.as_json()["layers"])
    if scale != 1:
        ctx.log(f"the residual stream is scaled by {scale:g}: its largest activation is {peaks.stream():,.0f}")
    for place in peaks.beyond():
        ctx.log(f"beyond fp16: {place}")
    return scale


def _tokens(source: Artifact, architecture: Architecture, config: CoremlConfig) -> list[Tokens]:
    """What the packages and the model are compared on."""
    from a1q.coreml.reference import beyond_window, sequences

    wanted = config.verify
    if wanted is None:
        return []
    beyond = beyond_window(architecture, config.prefill, config.context)
    prompt = wanted.prompt_length(config.prefill)
    return sequences(source.path, architecture.vocabulary, prompt, wanted.generate, wanted.random, beyond)


def _require_equal(bundle: Bundle, weights: DecoderWeights) -> None:
    """Compare every stored weight with the model's.

    Raises:
        StageError: naming what differs.
    """
    from a1q.coreml.stored import differences

    found = differences(bundle, weights)
    if found:
        raise StageError("the Core ML package is not what the model is: " + "; ".join(found))


def _verify(
    bundle: Bundle, expected: list[Reference], wanted: Verify, ctx: StageContext, adapter: str | None = None
) -> None:
    """Compare the packages as read back with the PyTorch model.

    Raises:
        StageError: naming what was not reached.
    """
    from a1q.coreml.verify import total_calls, verify_bundle

    total, calls = total_calls(expected, int(bundle.meta["prefill"])), itertools.count(1)
    report = verify_bundle(bundle, expected, wanted, lambda: ctx.progress(next(calls), total), adapter)
    ending = "" if adapter is None else f"_{adapter}"
    ctx.metrics.update({f"{name}{ending}": value for name, value in report.metrics().items()})
    if report.failures:
        what = "the model" if adapter is None else "the model without its adapters"
        raise StageError(f"the Core ML package is not what {what} is: " + "; ".join(report.failures))


def _verify_base(bundle: Bundle, source: Artifact, tokens: list[Tokens], wanted: Verify, ctx: StageContext) -> None:
    """The functions without adapters, compared with the model without them."""
    from a1q.coreml.reference import load_for_package, references

    model = load_for_package(source.path, adapters=False, repalettized=bundle.meta["repalettized"])
    _verify(bundle, references(model, tokens), wanted, ctx, "base")


def _measure(bundle: Bundle, view: Any, ctx: StageContext) -> None:
    """Sizes, operations and costs; a weight file of another size than its bits say fails the stage.

    Raises:
        StageError: naming the part.
    """
    from a1q.coreml.accounting import account_bundle

    report = account_bundle(bundle, view.parameters)
    theory = sum(part.theory_bytes or 0 for part in report.parts.values())
    ctx.metrics.update(
        bytes=sum(path.stat().st_size for path in ctx.out.rglob("*") if path.is_file()),
        weight_bytes=report.weight_bytes,
        theory_bytes=theory,
        size_ratio=report.weight_bytes / theory,
        bits_per_parameter=report.bits_per_parameter,
        bytes_per_token=report.bytes_per_token,
        multiply_adds_per_token=report.multiply_adds_per_token,
        multiply_adds_ratio=report.multiply_adds_ratio,
        parts={
            part.name: {
                "ops": {name: sum(function.operations.values()) for name, function in part.functions.items()},
                "weight_bytes": part.weight_bytes,
                "theory_bytes": part.theory_bytes,
                "bits_per_weight": part.bits_per_weight,
            }
            for part in report.parts.values()
        },
    )
    for part in report.parts.values():
        wanted = part.theory_bytes or 0
        if abs(part.weight_bytes - wanted) > max(SIZE_TOLERANCE * wanted, SIZE_SLACK):
            raise StageError(f"the weight file of {part.name} has {part.weight_bytes:,} bytes, its bits say {wanted:,}")


def _lint(bundle: Bundle, ctx: StageContext) -> None:
    """Say what the Neural Engine is known to dislike; notes are counted only, `a1q verify --lint` shows them."""
    from a1q.coreml.lint import digest, lint_bundle

    findings = lint_bundle(bundle)
    for line in digest(finding for finding in findings if finding.severity != "note"):
        ctx.log(line)
    ctx.metrics["lint"] = dict(sorted(Counter(finding.severity for finding in findings).items()))


def _meta(
    view: Any, config: CoremlConfig, options: Options, layout: Layout, parts: list[Part], outputs: list[str]
) -> dict[str, Any]:
    """What a program that loads the packages needs to know."""
    return {
        "format": 2,
        "layout": config.layout,
        "name": options.name,
        "model_type": view.config["model_type"],
        "context": config.context,
        "prefill": config.prefill,
        "vocabulary": view.config["vocab_size"],
        "eos_token_id": view.config.get("eos_token_id"),
        "state": layout.STATE,
        "outputs": outputs,
        "parts": [part.facts() for part in parts],
        "schemes": {m.name: dict(m.scheme) for m in view.modules.values() if m.scheme is not None},
        "residual_scale": options.residual_scale,
        "repalettized": {name: dict(rule) for name, rule in config.repalettize.items()},
        "adapters": ["base"] if options.adapter_functions else [],
    }


def _head_step(view: Any) -> int:
    """Rows of the head that stay together: those of one table among several, or of one vector."""
    from a1q.quant.build import make_scheme

    head = view.modules.get("model.embed_tokens" if view.tied else "lm_head")
    if head is None or head.scheme is None:
        return 1
    scheme = make_scheme(head.scheme)
    if scheme.vector > 1:
        return scheme.vector
    tables = scheme.part_shapes(head.shape, snapped=True).get("lut", ())
    return int(head.shape[0] // tables[0]) if len(tables) == 2 and tables[0] > 1 else 1


def _scheme_problems(view: Any) -> list[str]:
    """Modules whose scheme has no form that Core ML can hold."""
    from a1q.quant.build import make_scheme

    foreign = [m for m in view.modules.values() if m.scheme is not None and not make_scheme(m.scheme).hardware]
    if not foreign:
        return []
    schemes = " or ".join(sorted({f"{m.scheme['scheme']} at {m.scheme['bits']} bits" for m in foreign}))
    names = _some([module.name for module in foreign])
    return [f"Core ML can't hold {schemes} with these options: {names}; {repalettize.advice(foreign)}"]


def _verify_problems(config: CoremlConfig) -> list[str]:
    """What of the verification does not fit the context."""
    wanted = config.verify
    if wanted is None:
        return []
    found, prompt = [], wanted.prompt_length(config.prefill)
    if prompt + wanted.generate > config.context:
        found.append(
            f"verify: a prompt of {prompt} and {wanted.generate} generated tokens do not fit a context of "
            f"{config.context}"
        )
    if wanted.random > config.context:
        found.append(f"verify: {wanted.random} random tokens do not fit a context of {config.context}")
    return found


def _packages(count: int) -> str:
    return "a package" if count == 1 else f"{count} packages"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
