"""What `a1q import` found, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from a1q.engine.matching import summarize
from a1q.report.table import figure

WIDTH = 12


def text_of(found: Mapping[str, Any]) -> str:
    """The lines that `a1q import` prints, from what its JSON says."""
    if found["kind"] == "cache":
        return _lines(_cache(found))
    lines = [("checkpoint", f"{found['checkpoint']}")]
    if found["not_read"]:
        lines.append(("", f"not read, beside it: {', '.join(found['not_read'])}"))
    lines.append(("config", found["config"] or "none; what tensors don't say is as their programs set it"))
    lines += _adapter(found) if found["kind"] == "adapter" else _model(found)
    return _lines(lines)


def _lines(lines: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<{WIDTH}}{text}" for name, text in lines)


def _cache(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    cached = found["cached"]
    sizes = f"{cached['sequences']:,} sequences of {cached['seq_len']} tokens"
    lines = [
        ("cache", f"{found['cache']}: {sizes}, top {cached['top_k']}, {cached['random_negatives']} random"),
        ("text", f"{found['documents']:,} documents, {found['same']:.2%} of them the same tokens again"),
        ("answers", "not taken: without the logsumexp over the vocabulary logits are no probabilities"),
    ]
    if found["same_first"] is not None:
        lines.append(("teacher", f"{found['base']} ranks the cached token first at {found['same_first']:.1%}"))
    anew = f"{found['sequences']:,} and {found['tune_sequences']:,} held-out sequences"
    lines.append(("written", f"{found['output']}: the text, and a recipe that asks the teacher again: {anew}"))
    return [*lines, ("next", f"a1q run {found['recipe']}")]


def _adapter(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = _folded(found["adapters"])
    ranks = " and ".join(map(str, sorted(set(found["adapters"].values()))))
    return [
        ("adapters", f"{len(found['adapters'])} of rank {ranks}, alpha {found['alpha']:g}: {names}"),
        ("written", f"{found['output']}: a PEFT folder"),
        ("next", f"lora_recover: {{adapter: {{source: {found['output']}}}}} goes on from it"),
    ]


def _model(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
    lines = [("modules", kinds), *_schemes(found["schemes"])]
    if found["adapters"]:
        lines.append(("adapters", f"{len(found['adapters'])}, alpha {found['alpha']:g}, kept unmerged"))
    lines.append(("indices", _indices(found)))
    lines += [("", f"{count:,} stored twice and unequal: {note}") for note, count in found["differing"].items()]
    if found["floored"]:
        count = sum(found["floored"].values())
        far = f"up to {found['floored_error']:.2g} rms from V1's weight"
        where = _folded(found["floored"])
        lines.append(("floored", f"{count:,} entries ({count / found['weights']:.2%}), {far}"))
        lines.append(("", f"in {where}"))
    if found["latents"]:
        lines.append(
            ("latents", f"{found['latents']} modules can train their weights on (--latent drop leaves them out)")
        )
    if found["untied"]:
        lines.append(("head", "has a weight of its own here; in the base it is the embedding"))
    if found["from_base"]:
        lines.append(("from base", ", ".join(summarize(found["from_base"], 6))))
    measured = found["against_base"]
    if measured is None:
        lines.append(("kl", "not measured"))
    else:
        text = f"{measured['sequences']} x {measured['seq_len']} tokens of {measured['data']}"
        lines.append(("kl", f"{figure(measured['kl'])} nats per token to {found['base']}, over {text}"))
        ppl = f"{figure(measured['ppl'])} (base {figure(measured['teacher_ppl'])})"
        lines.append(("perplexity", f"{ppl}, same first token at {measured['top1']:.1%}"))
    bits = f"{found['bpw']:.3f} bits per weight, whole model {found['bpw_model']:.3f}"
    return [
        *lines,
        ("written", f"{found['output']}: {bits}"),
        ("next", f"a1q generate {found['output']}, or a recipe with `model: {{source: {found['output']}}}`"),
    ]


def _schemes(schemes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for name, spec in schemes.items():
        rank = f", rank {spec['rank']}" if "rank" in spec else ""
        bits = f"{spec['bits']} bit" + ("s" if spec["bits"] > 1 else "")
        groups.setdefault(f"{spec['scheme']}, {bits}{rank}", []).append(name)
    return [("", f"{said}: {_folded(names)}") for said, names in groups.items()]


def _folded(names: Iterable[str]) -> str:
    """Modules by the place that holds them: `model.layers.{0..27}.mlp gate_proj up_proj down_proj`."""
    places: dict[str, list[str]] = {}
    for name in summarize(names, 1000):
        place, _, leaf = name.rpartition(".")
        places.setdefault(place, []).append(leaf)
    return ", ".join(" ".join([place, *leaves]).strip() for place, leaves in places.items())


def _indices(found: Mapping[str, Any]) -> str:
    derived, all_of_them = len(found["derived"]), len(found["modules"])
    if not derived:
        return "as stored"
    rest = f"; as stored in the other {all_of_them - derived}" if derived < all_of_them else ""
    return f"not stored in {derived} modules: derived from weights and scales as their programs do{rest}"
