"""What `a1q inspect` found, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a1q.engine.matching import summarize
from a1q.report.table import figure, size, table

IN_A_LINE = 3
"""Names of a rule that are written out."""


def text_of(found: Mapping[str, Any]) -> str:
    """The facts that `a1q.looking.inspection.inspect` gives, for people."""
    ways = {"model": _model, "package": _package, "teacher": _teacher, "statistics": _statistics, "adapter": _adapter}
    head = f"{found['folder']}: {found['kind']}, {size(found['bytes'])}"
    return "\n".join([head, *ways.get(found["kind"], _content)(found)])


def modules_of(found: Mapping[str, Any]) -> str:
    """A line a quantized module."""
    rows = []
    for name, facts in found["modules"].items():
        numbers = facts["numbers"]
        rows.append(
            [
                name,
                _scheme(facts),
                "x".join(map(str, facts["shape"])),
                f"{facts['bits_per_weight']:.3f}",
                _tables(numbers["tables"]),
                _scales(numbers["scales"]),
                _half(numbers["half"], numbers["finite"]),
            ]
        )
    head = ["module", "scheme", "shape", "bits", "dead entries, bits of use", "scales", "fp16"]
    return table(head, rows, right=(3,)) if rows else "no quantized module"


def _model(found: Mapping[str, Any]) -> list[str]:
    tied = ", tied" if found["tied"] else ""
    lines = [
        f"{found['model_type']}, {figure(found['layers'])} layers of width {figure(found['hidden'])}, vocabulary "
        f"{figure(found['vocabulary'])}{tied}, context {figure(found['context'])}, {found['parameters']:,} parameters",
        f"bits per weight {found['bpw']:.3f} of quantized linears, {found['bpw_model']:.3f} of the whole model",
        "",
        table(
            ["bytes", "share", "of what"],
            [
                [f"{count:,}", f"{count / max(sum(found['bytes_by_kind'].values()), 1):.1%}", kind]
                for kind, count in found["bytes_by_kind"].items()
            ],
            right=(0, 1),
        ),
    ]
    if found["dense"]:
        lines += ["", "fp16 of what no scheme stores"]
    wide = max(map(len, found["dense"]), default=0)
    for kind, dense in found["dense"].items():
        half = dense["half"]
        lines.append(f"  {kind:{wide}}  {_fits(half['beyond'], half['subnormal'], half['rounding'], dense['largest'])}")
        if dense["not_finite"]:
            lines.append(f"  NOT FINITE: {', '.join(summarize(dense['not_finite']))}")
    for rule in found["rules"]:
        names = summarize(rule["modules"], IN_A_LINE)
        count = len(rule["modules"])
        counted = f"{count} module{'s' * (count > 1)}"
        lines += ["", f"{_scheme(rule)}, {rule['bits_per_weight']:.3f} bits per weight, {counted}"]
        lines += [f"    {name}" for name in names]
        numbers = rule["numbers"]
        if numbers:
            lines += _numbers(numbers)
    return lines


def _numbers(numbers: Mapping[str, Any]) -> list[str]:
    lines = []
    if "tables" in numbers:
        entries = " and ".join(map(str, numbers["entries"]))
        lines.append(
            f"  tables  {numbers['tables']:,} of {entries} entries, {numbers['dead_entries']:,} entries never used "
            f"({numbers['dead_share']:.1%}), an index carries {numbers['entropy']:.2f} bits"
        )
    if "scale_most" in numbers:
        lines.append(
            f"  scales  {figure(numbers['scale_least'])} to {figure(numbers['scale_most'])}, "
            f"{numbers['scale_negative']:.1%} negative"
        )
    fits = _fits(numbers["fp16_beyond"], numbers["fp16_subnormal"], numbers["fp16_rounding"], numbers["largest"])
    lines.append(f"  fp16    {fits}")
    if numbers["not_finite"]:
        lines.append(f"  NOT FINITE: {', '.join(summarize(numbers['not_finite']))}")
    return lines


def _fits(beyond: int, subnormal: float, rounding: float, largest: float) -> str:
    """How numbers fit fp16."""
    return (
        f"{beyond:,} numbers beyond 65504, {subnormal:.1%} below 2^-14, rounding {rounding:.1e}; "
        f"largest weight {figure(largest)}"
    )


def _scheme(facts: Mapping[str, Any]) -> str:
    scheme = facts["scheme"]
    if scheme is None:
        return f"{facts['kind']}s, {facts['state']}" if facts["kind"] == "embedding" else "linears, dense"
    rank = f" rank {scheme['rank']}" if "rank" in scheme else ""
    adapter = f", adapter of rank {facts['adapter']}" if facts["adapter"] else ""
    latent = ", latents kept" if facts["latent"] else ""
    kind = " embedding" if facts["kind"] == "embedding" else ""
    return f"{scheme['scheme']} {scheme.get('bits', '')} bit{rank}{kind}, {facts['state']}{adapter}{latent}"


def _tables(use: Mapping[str, Any] | None) -> str:
    return "" if use is None else f"{use['dead']} of {use['tables'] * use['entries']}, {use['entropy']:.2f}"


def _scales(scales: Mapping[str, Any] | None) -> str:
    if scales is None:
        return ""
    negative = f", {scales['negative']:.1%} negative" if scales["negative"] else ""
    return f"{figure(scales['least'])} to {figure(scales['most'])}{negative}"


def _half(half: Mapping[str, Any], finite: bool) -> str:
    if not finite:
        return "NOT FINITE"
    beyond = f"{half['beyond']} beyond, " if half["beyond"] else ""
    return f"{beyond}rounding {half['rounding']:.1e}"


def _package(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, part in found["parts"].items():
        bits = "" if part["bits_per_weight"] is None else f"{part['bits_per_weight']:.3f}"
        kinds = ", ".join(f"{kind} {size(count)}" for kind, count in part["bytes_by_kind"].items() if count)
        calls = ", ".join(f"{label} {figure(count)}" for label, count in part["functions"].items())
        rows.append([name, f"{part['bytes']:,}", bits, calls, kinds])
    return [
        f"layout {found['layout']}, context {found['context']:,}, vocabulary {found['vocabulary']:,}, "
        f"{size(found['bytes_per_token'])} of weights read a token, {size(found['cache_bytes'])} of cache",
        "",
        table(["part", "bytes", "bits per weight", "functions and tokens a call", "weights"], rows, right=(1, 2)),
    ]


def _teacher(found: Mapping[str, Any]) -> list[str]:
    counts = found["sequences"]
    said = found["assistant_tokens"]
    lines = [
        f"{counts['train']:,} + {counts['tune']:,} sequences of {found['seq_len']} tokens, top {found['top_k']} of "
        f"{found['vocabulary']:,} logits and {found['random_negatives']} others",
        f"documents {'apart' if found['separate'] else 'see those before them'}; data {found['data']['name']} "
        f"{found['data']['digest'][:12]}, tokenizer {found['tokenizer'][:12]}",
    ]
    if found["chat_template"]:
        ways = ", ".join(sorted(found["prompts"] or {})) or "as the template does by itself"
        known = "unknown" if said is None else f"{said['train']:,} tokens"
        lines.append(f"chat template {found['chat_template'][:12]}, thinking {ways}; said by assistants: {known}")
    return lines


def _statistics(found: Mapping[str, Any]) -> list[str]:
    largest = sorted(found["largest"].items(), key=lambda item: -item[1])[:5]
    apart = "documents apart" if found["documents_apart"] else "documents see those before them"
    return [
        f"{found['modules']} modules over {found['sequences']:,} sequences, {found['tokens']:,} tokens, {apart}, "
        f"{'with' if found['gradients'] else 'without'} gradients",
        "",
        table(["largest input, root mean square of a channel", ""], [[name, figure(value)] for name, value in largest]),
    ]


def _adapter(found: Mapping[str, Any]) -> list[str]:
    ranks = sorted({item["rank"] for item in found["modules"].values()})
    return [
        f"of {found['base'] or 'a model it does not name'}, rank {', '.join(map(str, ranks))} on "
        f"{len(found['modules'])} modules",
        *(f"    {name}" for name in summarize(found["modules"])),
    ]


def _content(found: Mapping[str, Any]) -> list[str]:
    import json

    return [json.dumps(found["content"], indent=2, ensure_ascii=False)]
