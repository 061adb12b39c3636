"""The table at the end of a run, and what `a1q show` prints: both are read from report.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.report.table import duration, figure, table

KEY_METRICS = (
    *("kl", "kl_before", "kl_after", "kl_refit", "ppl", "teacher_ppl", "top1", "bpw", "bpw_model"),
    *("cosine", "cosine_fp32", "cosine_fp16", "loss", "bytes"),
)
"""Shown first, in this order."""
SHOWN = 5


def summary(report: Mapping[str, Any], folder: Path) -> str:
    """Stages with seconds, hit or miss and main figures; then the exports and how the run ended."""
    rows = [
        [item["id"], item["stage"], item["cache"], duration(item["seconds"]), main_figures(item["metrics"])]
        for item in report["stages"]
    ]
    lines = [table(["stage", "type", "cache", "time", "figures"], rows, right=[3])] if rows else []
    lines += [f"export {name}: {folder / place}" for name, place in report["exports"].items()]
    return "\n".join([*lines, ending(report)])


def ending(report: Mapping[str, Any]) -> str:
    """One line: how the run ended, and where if not well."""
    took = f" after {duration(report['seconds'])}" if "seconds" in report else ""
    place = f" in stage {report['running']}" if report.get("running") else ""
    error = f": {report['error']}" if report["error"] else ""
    return f"{report['status']}{took}{place}{error}"


def main_figures(metrics: Mapping[str, Any]) -> str:
    """The first `SHOWN` numbers among a stage's metrics, and how many more there are."""
    flat = {
        name: item for name, item in metrics.items() if isinstance(item, int | float) and not isinstance(item, bool)
    }
    names = [name for name in KEY_METRICS if name in flat] + [name for name in flat if name not in KEY_METRICS]
    more = f"  (+{len(names) - SHOWN})" if len(names) > SHOWN else ""
    return "  ".join(f"{name} {figure(flat[name])}" for name in names[:SHOWN]) + more
