"""The table at the end of a run, and what `a1q show` prints: both are read from report.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.report.rules import by_group, rules_of
from a1q.report.table import duration, figure, table

KEY_METRICS = (
    *("kl", "kl_before", "kl_after", "kl_rounding", "kl_refit", "ppl", "teacher_ppl", "top1", "bpw", "bpw_model"),
    *("cosine", "cosine_fp32", "cosine_fp16", "loss", "bytes"),
)
"""Shown first, in this order."""
SHOWN = 5


def summary(report: Mapping[str, Any], folder: Path, width: int | None = None) -> str:
    """Stages with seconds, hit or miss and main figures; then the exports and how the run ended.

    With `width`, the columns of a terminal, each stage shows only the figures that fit in its line.
    """
    stages = report["stages"]
    head = ["stage", "type", "cache", "time", "figures"]
    facts = [[item["id"], item["stage"], item["cache"], duration(item["seconds"])] for item in stages]
    taken = sum(max(map(len, column)) + 2 for column in zip(head, *facts, strict=False))
    room = None if width is None else width - taken
    rows = [[*fact, main_figures(item["metrics"], room)] for fact, item in zip(facts, stages, strict=True)]
    lines = [table(head, rows, right=[3])] if rows else []
    for item in stages:
        if chosen := rules_of(folder, item):
            place = folder / "rules" / item["id"]
            lines += ["", f"{item['id']} chose, and {place} has it to pin:", by_group(chosen), ""]
    lines += [f"export {name}: {folder / place}" for name, place in report["exports"].items()]
    return "\n".join([*lines, ending(report)])


def ending(report: Mapping[str, Any]) -> str:
    """One line: how the run ended, and where if not well."""
    took = f" after {duration(report['seconds'])}" if "seconds" in report else ""
    running = report.get("running")
    told = running and str(report["error"]).startswith(f"stage {running}:")
    place = f" in stage {running}" if running and not told else ""
    error = f": {report['error']}" if report["error"] else ""
    return f"{report['status']}{took}{place}{error}"


def main_figures(metrics: Mapping[str, Any], room: int | None = None) -> str:
    """The first `SHOWN` numbers among a stage's metrics, fewer if they need more than `room` characters (one is always
    shown), and how many more there are."""
    flat = {
        name: item for name, item in metrics.items() if isinstance(item, int | float) and not isinstance(item, bool)
    }
    names = [name for name in KEY_METRICS if name in flat] + [name for name in flat if name not in KEY_METRICS]
    texts = [f"{name} {figure(flat[name])}" for name in names]
    for shown in range(min(SHOWN, len(texts)), -1, -1):
        text = "  ".join(texts[:shown]) + (f"  (+{len(texts) - shown})" if len(texts) > shown else "")
        if room is None or len(text) <= room or shown <= 1:
            break
    return text
