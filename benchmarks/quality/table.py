"""The results as a Markdown table and as JSON: mean and spread over seeds, ratios, and the targets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.quality.cells import Cell, Row, best_rate, read_result, rows
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.targets import LAYER_GIB, LAYER_SECONDS, TARGETS, Target, reference_row
from benchmarks.quality.teachers import TEACHERS

Results = Mapping[Cell, Mapping[str, Any]]
FILES = RESULTS / "quality"
LAYER = FILES / "layer.json"


def known_results(seeds: Sequence[int], check: bool = True) -> dict[Cell, dict[str, Any]]:
    """Every cell on disk, grids included; with `check` only those that would not run again."""
    found = {}
    for row in rows():
        grid = row.grid()
        cells = dict.fromkeys([*grid, *(cell for each in grid for cell in row.cells(seeds, each.lr))])
        for cell in cells or row.cells(seeds, None):
            if (result := read_result(cell, check)) is not None:
                found[cell] = result
    return found


def summarize(row: Row, results: Results, seeds: Sequence[int]) -> dict[str, Any] | None:
    """The figures of a row over the seeds that are there; None if there are none, or the grid is not complete."""
    grid = row.grid()
    lr = best_rate(results, grid) if grid else None
    if grid and lr is None:
        return None
    cells = [cell for cell in row.cells(seeds, lr) if cell in results]
    found = [results[cell] for cell in cells]
    if not found or any(result["kl"]["test"] is None for result in found):
        return None
    kl = [result["kl"]["test"] for result in found]
    return {
        "teacher": row.teacher,
        "setting": row.setting,
        "method": row.method,
        "seeds": [cell.seed for cell in cells],
        "of_seeds": len(row.cells(seeds, lr)),
        "lr": lr,
        "kl": statistics.fmean(kl),
        "kl_spread": statistics.stdev(kl) if len(kl) > 1 else None,
        "kl_tune": statistics.fmean(result["kl"]["tune"] for result in found),
        "top1": statistics.fmean(result["top1"]["test"] for result in found),
        "bpw": found[0]["bpw"],
        "bits_per_parameter": found[0]["bits_per_parameter"],
        "fit": statistics.fmean(result["seconds"]["fit"] for result in found),
        "train": statistics.fmean(result["seconds"].get("train", 0.0) for result in found),
        "peak_bytes": max(result["peak_bytes"] for result in found),
    }


def judge(target: Target, summaries: Mapping[Row, Mapping[str, Any]]) -> dict[str, Any]:
    """A target beside what was measured; `met` is None while something is missing."""
    ours, other = summaries.get(target.ours), summaries.get(target.reference)
    found: dict[str, Any] = {
        "target": target.name,
        "stretch": target.stretch,
        "figure": target.figure,
        "ours": target.ours.name,
        "reference": target.reference.name,
        "limit": target.factor,
        "ratio": None,
        "met": None,
    }
    if ours is None or other is None:
        return found
    ratio = ours[target.figure] / other[target.figure]
    bits = [
        (ours["bpw"], target.bpw),
        (ours["bits_per_parameter"], target.bits_per_parameter),
    ]
    # Limits are quoted to two places: 2.0995 bits are 2.10.
    within = all(limit is None or round(value, 2) <= limit for value, limit in bits)
    figures = {"our figure": ours[target.figure], "reference figure": other[target.figure]}
    sizes = {"bpw": ours["bpw"], "bits_per_parameter": ours["bits_per_parameter"], "reference bpw": other["bpw"]}
    return {**found, **figures, **sizes, "ratio": ratio, "met": bool(ratio <= target.factor and within)}


def make_table(seeds: Sequence[int], check: bool = True, folder: Path | None = None) -> str:
    """Write `table.md` and `table.json`, and return the Markdown."""
    from a1q.engine.files import write_atomic

    results = known_results(seeds, check)
    summaries = {row: found for row in rows() if (found := summarize(row, results, seeds)) is not None}
    judged = [judge(target, summaries) for target in TARGETS]
    layer = json.loads(LAYER.read_text(encoding="utf-8")) if LAYER.is_file() else None
    text = "\n".join([*target_lines(judged, layer), *setting_lines(summaries)]) + "\n"
    folder = folder or FILES
    folder.mkdir(parents=True, exist_ok=True)
    written = {"rows": list(summaries.values()), "targets": judged, "layer": layer, "machines": machines(results)}
    write_atomic(folder / "table.json", json.dumps(written, indent=2) + "\n")
    write_atomic(folder / "table.md", text)
    return text


def machines(results: Results) -> list[dict[str, Any]]:
    """The machines that the cells ran on."""
    found = {json.dumps(result["machine"], sort_keys=True): result["machine"] for result in results.values()}
    return list(found.values())


def target_lines(judged: Sequence[Mapping[str, Any]], layer: Mapping[str, Any] | None) -> list[str]:
    """The targets as Markdown."""
    lines = [
        "## Targets",
        "",
        "S: beyond what any prototype had reached. Mean of the seeds, on the test side.",
        "",
        "| target | ours | bits | figure | against | bits | figure | ratio | limit | met |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in judged:
        name = item["target"] + (" (S)" if item["stretch"] else "")
        if item["ratio"] is None:
            figures = ["", "", item["reference"], "", "", ""]
        else:
            whole = item["ours"].split(".")[1] == "whole"
            bits = f"{item['bits_per_parameter']:.3f} per parameter" if whole else f"{item['bpw']:.3f}"
            unit = " s" if item["figure"] == "fit" else ""
            figures = [
                bits,
                digits(item["our figure"]) + unit,
                item["reference"],
                f"{item['reference bpw']:.3f}",
                digits(item["reference figure"]) + unit,
                f"{item['ratio']:.3f}",
            ]
        met = {True: "yes", False: "**no**", None: "not measured"}[item["met"]]
        lines.append(_line([name, item["ours"], *figures, f"{item['limit']:.2f}", met]))
    name = "fit of a layer of Qwen3-0.6B's shape, rank 8"
    if layer is None:
        lines.append(_line([name, "a1q", "", "", "", "", "", "", f"{LAYER_SECONDS:.0f} s", "not measured"]))
    else:
        seconds, gib = layer["seconds"], layer["peak_bytes"] / 2**30
        met = "yes" if seconds <= LAYER_SECONDS and gib <= LAYER_GIB else "**no**"
        limit = f"{LAYER_SECONDS:.0f} s, {LAYER_GIB:.0f} GiB"
        lines.append(_line([name, "a1q", "", f"{seconds:.1f} s, {gib:.2f} GiB", "", "", "", "", limit, met]))
    return [*lines, ""]


def setting_lines(summaries: Mapping[Row, Mapping[str, Any]]) -> list[str]:
    """One table per teacher and setting, the best KL first."""
    lines: list[str] = []
    for teacher in TEACHERS:
        for setting in SETTINGS:
            found = [item for row, item in summaries.items() if (row.teacher, row.setting) == (teacher, setting)]
            if found:
                reference = summaries.get(reference_row(teacher, setting))
                lines += _setting_table(teacher, setting, sorted(found, key=lambda item: item["kl"]), reference)
    return lines


def _setting_table(
    teacher: str, setting: str, found: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None
) -> list[str]:
    against = reference_row(teacher, setting)
    lines = [
        f"## {teacher}, {setting}",
        "",
        f"| method | bits per weight | bits per parameter | KL | spread | of {against.method} | top-1 | lr | fit, s "
        "| training, s | peak, GiB | seeds |",
        "|" + "---|" * 12,
    ]
    for item in found:
        lines.append(
            _line(
                [
                    item["method"],
                    f"{item['bpw']:.3f}",
                    f"{item['bits_per_parameter']:.3f}",
                    digits(item["kl"]),
                    "" if item["kl_spread"] is None else f"{item['kl_spread']:.1g}",
                    "" if reference is None else f"{item['kl'] / reference['kl']:.3f}",
                    f"{item['top1']:.4f}",
                    "" if item["lr"] is None else f"{item['lr']:g}",
                    f"{item['fit']:.1f}",
                    f"{item['train']:.0f}" if item["train"] else "",
                    f"{item['peak_bytes'] / 2**30:.2f}",
                    f"{len(item['seeds'])} of {item['of_seeds']}",
                ]
            )
        )
    return [*lines, ""]


def digits(value: float) -> str:
    """Four significant digits."""
    return f"{value:#.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
