"""What `a1q verify` found out, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from a1q.report.table import figure, size, table

FIGURES = {
    "positions": "positions compared",
    "cosine": "cosine of the logits, smallest",
    "cosine_mean": "cosine, mean",
    "max_error": "error of a logit, largest",
    "relative_error": "the same over their deviation, weights in fp16",
    "kl": "KL divergence in nats, mean",
    "kl_max": "KL divergence, largest",
    "agreement": "same first choice",
    "decisive": "first choice leads by 4 largest errors",
    "decisive_agreement": "same first choice there",
    "choice_agreement": "of the model's own text chosen",
    "greedy_agreement": "of it written before the first difference",
    "overflows": "numbers that are not finite",
}
"""Figure -> what the table calls it."""
SHARES = ("agreement", "decisive", "decisive_agreement", "choice_agreement", "greedy_agreement")


def text_of(found: Mapping[str, Any], lint: bool, placements: bool) -> str:
    """The whole report.

    Args:
        found: the document that `a1q verify --json` prints.
        lint: whether every finding is listed.
        placements: whether every operation's place is listed, where Core ML was asked.
    """
    sections = [_figures(found), _costs(found["costs"]), _lint(found["lint"], lint), _core_ml(found, placements)]
    if found["ok"]:
        sections.append(f"{found['package']} computes what {found['against']} computes")
    return "\n\n".join("\n".join(section) if not isinstance(section, str) else section for section in sections)


def _figures(found: Mapping[str, Any]) -> str:
    ways = found["figures"]
    rows = [[title, *(_cell(name, figures[name]) for figures in ways.values())] for name, title in FIGURES.items()]
    text = table(["", *ways], rows, right=range(1, len(ways) + 1))
    rules = ", ".join(found["repalettized"])
    anew = [f"compared with the model fitted anew by {rules}; `a1q show` says what that lost"] if rules else []
    places = [f"first not finite in {way}: {f['overflow_at']}" for way, f in ways.items() if f["overflow_at"]]
    return "\n".join([text, *anew, *places, *_trace(found["trace"])])


def _trace(trace: Mapping[str, Any]) -> Iterator[str]:
    yield f"fp16 is more than 5 % off fp32: {trace['leaves_fp32_at'] or 'in no operation'}"
    yield f"largest activation: {figure(trace['peak'])} in {trace['peak_at']}; fp16 ends at 65504"
    for place, error in trace["most_rounded"].items():
        yield f"most rounded: {place}, by {error:.2g} of its size"


def _cell(name: str, value: Any) -> str:
    if name in SHARES:
        return f"{value:.1%}"
    return f"{value:.8f}" if name.startswith("cosine") else figure(value)


def _costs(costs: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [
            part["name"],
            ", ".join(f"{name} {sum(f['operations'].values())}" for name, f in part["functions"].items()),
            size(part["weight_bytes"]),
            "-" if part["bits_per_weight"] is None else f"{part['bits_per_weight']:.3f}",
            "-" if part["size_ratio"] is None else f"{part['size_ratio']:.2%}",
        ]
        for part in costs["parts"].values()
    ]
    yield table(["part", "operations", "weights", "bits/weight", "of theory"], rows, right=(2, 3, 4))
    products, ratio = costs["multiply_adds_per_token"] / 1e6, costs["multiply_adds_ratio"]
    yield (
        f"{costs['bits_per_parameter']:.3f} bits per parameter; a token reads {size(costs['bytes_per_token'])} of "
        f"weights and costs {products:,.1f} M multiply-adds, {ratio:.2f} times the dense model's"
    )


def _lint(findings: list[Mapping[str, Any]], everything: bool) -> Iterator[str]:
    if everything:
        yield from (finding["text"] for finding in findings)
    counts = [
        f"{sum(f['severity'] == kind for f in findings)} {kind}s" for kind in ("error", "warning", "note")
    ]  # not `rules.SEVERITIES`: a report imports nothing that computes
    yield f"Neural Engine rules: {', '.join(counts)}" + ("" if everything else "; --lint shows them")


def _core_ml(found: Mapping[str, Any], everything: bool) -> Iterator[str]:
    core_ml = found["coreml"]
    if not core_ml["ran"]:
        yield f"Core ML itself was not run: {core_ml['reason']}. On a Mac: {core_ml['command']}"
        return
    if everything:
        head = ["part", "function", "operation", "type", "runs on", "could run on"]
        rows = [
            [part, p["function"], p["operation"], p["type"], p["preferred"], ", ".join(p["supported"])]
            for part, items in core_ml["operations"].items()
            for p in items
        ]
        yield table(head, rows)
    for part, summary in core_ml["placement"].items():
        shares = ", ".join(f"{share:.0%} {device}" for device, share in summary["share_of_operations"].items())
        elsewhere = ", ".join(f"{count} {kind}" for kind, count in summary["off_engine"].items())
        yield f"{part}: operations on {shares}" + (f"; off the Neural Engine: {elsewhere}" if elsewhere else "")
    yield from (f"compiled: {path}" for path in core_ml["compiled"])
