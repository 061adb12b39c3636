"""KL against bits per weight, as PNG and SVG: one panel without training, one with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.table import FILES, known_results, summarize

Summary = Mapping[str, Any]
OURS = ("a1q", "a1q-budget", "a1q-wide", "a1q-pairs", "a1q-scales")


def make_plot(
    seeds: Sequence[int], teacher: str = "pico", check: bool = True, folder: Path | None = None
) -> list[Path]:
    """Write `kl.png` and `kl.svg` and return their paths; the whole-model setting, priced by parameter, is left out."""
    from benchmarks.quality.cells import rows

    results = known_results(seeds, check)
    found = [
        summary
        for row in rows()
        if row.teacher == teacher and not SETTINGS[row.setting].whole and (summary := summarize(row, results, seeds))
    ]
    return draw(found, teacher, folder or FILES)


def draw(summaries: Sequence[Summary], teacher: str, folder: Path) -> list[Path]:
    """The figure of these rows."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "a1q"  # equal figures give equal files
    from matplotlib import pyplot

    methods = list(dict.fromkeys(item["method"] for item in summaries))
    colours = {method: pyplot.get_cmap("tab20")(index % 20) for index, method in enumerate(methods)}
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 6), sharey=True, width_ratios=(3, 2), layout="constrained")
    panels = {"no training": False, "200 steps of distillation": True}
    for axis, (title, trained) in zip(axes, panels.items(), strict=True):
        inside = [item for item in summaries if bool(SETTINGS[item["setting"]].steps) == trained]
        for method in methods:
            points = sorted(
                (item["bpw"], item["kl"], item["kl_spread"] or 0.0) for item in inside if item["method"] == method
            )
            if points:
                bits, kl, spread = zip(*points, strict=True)
                mine = method in OURS
                axis.errorbar(
                    bits,
                    kl,
                    yerr=spread,
                    label=method.removeprefix("peer:"),
                    color=colours[method],
                    marker="o" if mine else "s",
                    markersize=8 if mine else 5,
                    linewidth=2 if mine else 1,
                    linestyle="-" if mine else "--",
                    capsize=2,
                )
        axis.set(title=title, xlabel="bits per quantized weight, all counted", yscale="log")
        axis.grid(True, which="both", alpha=0.25)
        if inside:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("KL, nats per token (test side)")
    figure.suptitle(f"Quality at equal bits: {teacher}, mean of the seeds")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "kl.png", folder / "kl.svg"]
    figure.savefig(paths[0], dpi=130)
    figure.savefig(paths[1], metadata={"Date": None})
    pyplot.close(figure)
    return paths
