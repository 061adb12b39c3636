"""What `a1q compare` found, as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from a1q.report.table import figure, size, table


def text_of(found: Mapping[str, Any], names: tuple[str, str], width: int) -> str:
    """Figures, sizes, errors and samples of two models.

    Args:
        names: what the two were called.
        width: columns for the samples, which stand side by side.
    """
    first, second = found["sizes"]
    rows = [["bytes", size(first["bytes"]), size(second["bytes"])]]
    for key, label in (("bpw", "bits per quantized linear weight"), ("bpw_model", "bits per parameter")):
        if key in first or key in second:
            rows.append([label, *(f"{item[key]:.3f}" if key in item else "" for item in (first, second))])
    both = "bytes_by_kind" in first and "bytes_by_kind" in second
    kinds = dict.fromkeys([*first["bytes_by_kind"], *second["bytes_by_kind"]] if both else [])
    for kind in kinds:
        rows.append([f"  {kind}", *(size(item.get("bytes_by_kind", {}).get(kind, 0)) for item in (first, second))])
    measured = found["figures"]
    rows += [
        ["perplexity", f"{measured['reference_ppl']:.4f}", f"{measured['ppl']:.4f}"],
        ["nats a token", f"{measured['reference_loss']:.5f}", f"{measured['loss']:.5f}"],
    ]
    lines = [
        table(["", *names], rows, right=(1, 2)),
        "",
        f"KL {measured['kl']:.6f} nats a token from {names[0]}, the same likeliest token {measured['top1']:.2%}, "
        f"over {measured['tokens']:,} tokens",
    ]
    if found["layers"]:
        lines += ["", "relative squared error of what decoder layers answer"]
        lines += [f"  {number:3}  {_error(value)}".rstrip() for number, value in enumerate(found["layers"])]
    if found["modules"]:
        worst = sorted(found["modules"].items(), key=lambda item: -math.inf if item[1] is None else -item[1])
        shown = [(name, value) for name, value in worst if value != 0][:10]
        title = f"relative squared error of weights, the largest of {len(worst)} modules"
        lines += ["", title if shown else "weights: equal"]
        lines += [f"  {figure(value):>10}  {name}" for name, value in shown]
    if found["samples"]:
        lines += ["", *_beside(list(names), width)]
    for item in found["samples"]:
        lines += ["", f"» {item['prompt']}", *_beside(item["written"], width)]
    return "\n".join(lines)


def _error(value: float | None) -> str:
    """A number and a bar, as long as its root."""
    return figure(None) if value is None else f"{value:.2e}  {'█' * min(round(40 * value**0.5), 60)}"


def _beside(texts: list[str], width: int) -> list[str]:
    """Two texts in columns."""
    each = max((width - 3) // 2, 20)
    left, right = (
        [part for line in text.strip("\n").split("\n") for part in textwrap.wrap(line, each) or [""]] for text in texts
    )
    count = max(len(left), len(right))
    left, right = ([*lines, *[""] * (count - len(lines))] for lines in (left, right))
    return [f"{a:{each}} │ {b}".rstrip() for a, b in zip(left, right, strict=True)]
