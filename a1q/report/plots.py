"""Charts as pictures: PNG and SVG, by matplotlib. Equal charts give equal bytes on one version of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a1q.engine.files import write_atomic
from a1q.errors import MismatchError
from a1q.report.curves import Chart

SIZE, DOTS = (7.2, 4.2), 110
"""Inches, and dots per inch of a PNG."""
COLOURS = ("#2a6fbb", "#d1495b", "#2f8f6b", "#8d6cab", "#c98b1b", "#4a4a4a")


def require_matplotlib() -> Any:
    """The library.

    Raises:
        MismatchError: if it isn't installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MismatchError("plots take matplotlib: pip install 'a1q[plots]'") from None
    matplotlib.use("agg")
    return matplotlib


def draw(chart: Chart, folder: Path, formats: Sequence[str], labels: Sequence[str] = ()) -> list[Path]:
    """Write a chart as `folder/NAME.FORMAT`, whole or not at all.

    Args:
        formats: `png`, `svg`.
        labels: of the whole numbers on the x axis, where the chart counts stages.
    """
    matplotlib = require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    written = []
    settings = {"svg.hashsalt": chart.name, "svg.fonttype": "none", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(chart.lines):
            marker = "o" if chart.steps or line.marked else None
            axes.plot(
                line.x, line.y, label=line.label, color=COLOURS[number % len(COLOURS)], marker=marker, markersize=5
            )
        axes.set_title(chart.title)
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
        if chart.logarithmic:
            axes.set_yscale("log")
        elif chart.zero:
            axes.set_ylim(bottom=min(0.0, *(min(line.y) for line in chart.lines)))
        if labels:
            axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(chart.lines) > 1:
            axes.legend(frameon=False)
        for suffix in formats:
            content = io.BytesIO()
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(content, format=suffix, dpi=DOTS, metadata=metadata)
            path = folder / f"{chart.name}.{suffix}"
            write_atomic(path, content.getvalue())
            written.append(path)
    return written
