"""What of a run can be drawn: curves of its stages, step by step, and errors layer by layer. No plotting here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1q.errors import MismatchError

TRAINING = ("train", "lora_recover", "pretrain")
"""Stages whose loss is in nats per token."""
RATES = ("lr", "norm", "tokens_per_second")
"""Figures of a step that are drawn by themselves: share of the learning rate, gradient norm, speed."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False
    """Whether its points are few and each was measured."""


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    name: str
    """For file names: `q2_train-loss`."""
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    logarithmic: bool = False
    zero: bool = True
    """Whether y begins at 0, where it is not logarithmic."""
    steps: bool = False
    """Whether x counts things that are one by one."""


def charts_of(report: Mapping[str, Any], folder: Path) -> list[Chart]:
    """Every chart that a run's report and `metrics/ID.jsonl` have something for, in the order of the stages.

    Raises:
        MismatchError: if a file is damaged.
    """
    found: list[Chart] = []
    for stage in report["stages"]:
        lines = _lines(folder / "metrics" / f"{stage['id']}.jsonl")
        found += _of_steps(stage["id"], lines, "nats per token" if stage["stage"] in TRAINING else "relative error")
    errors = [
        Line(stage["id"], *_by_layer(stage["metrics"]["error_by_layer"]))
        for stage in report["stages"]
        if stage["metrics"].get("error_by_layer")
    ]
    if errors:
        title, y = "Error of weights by layer", "relative squared error of what linears answer"
        found.append(Chart("error-by-layer", title, "decoder layer", y, errors, steps=True))
    divergence = _divergence(report["stages"])
    if len(divergence.x) > 1:
        title = "KL to the teacher, as each stage measured it"
        wide = _is_wide([divergence])
        found.append(Chart("kl", title, "stage", "KL, nats per token", [divergence], logarithmic=wide, steps=True))
    return found


def labels_of(report: Mapping[str, Any]) -> list[str]:
    """The stages that the chart `kl` counts."""
    return [stage["id"] for stage in report["stages"] if _kl(stage["metrics"]) is not None]


def _of_steps(stage: str, lines: Sequence[Mapping[str, Any]], unit: str) -> list[Chart]:
    loss = _line("loss", lines, "loss")
    if len(loss.x) < 2:
        return []
    tune = _where_it_changes(_line("held out", lines, "tune"))
    curves = [line for line in (loss, tune) if line.x]
    charts = [Chart(f"{stage}-loss", f"{stage}: loss", "step", unit, curves, logarithmic=_is_wide(curves), zero=False)]
    titles = {
        "lr": ("learning rate", "share of the rate"),
        "norm": ("gradient norm", "norm"),
        "tokens_per_second": ("speed", "tokens per second"),
    }
    for name in RATES:
        line = _line(name, lines, name)
        if len(line.x) > 1:
            title, y = titles[name]
            charts.append(Chart(f"{stage}-{name.replace('_', '-')}", f"{stage}: {title}", "step", y, [line]))
    return charts


def _line(label: str, lines: Sequence[Mapping[str, Any]], key: str) -> Line:
    points = [
        (float(line["step"]), float(line[key]))
        for line in lines
        if _is_number(line.get("step")) and _is_number(line.get(key))
    ]
    return Line(label, [x for x, _ in points], [y for _, y in points])


def _where_it_changes(line: Line) -> Line:
    """Only the points at which a value was new: between measurements, lines repeat the last."""
    new = [number for number, value in enumerate(line.y) if number == 0 or value != line.y[number - 1]]
    return Line(line.label, [line.x[number] for number in new], [line.y[number] for number in new], marked=True)


def _is_wide(lines: Sequence[Line]) -> bool:
    """Whether values are positive and span more than a power of ten, so that only a logarithm shows all of them."""
    values = [value for line in lines for value in line.y]
    return min(values) > 0 and max(values) > 10 * min(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _by_layer(errors: Mapping[str, float]) -> tuple[list[float], list[float]]:
    items = sorted((int(layer), value) for layer, value in errors.items())
    return [float(layer) for layer, _ in items], [value for _, value in items]


def _divergence(stages: Sequence[Mapping[str, Any]]) -> Line:
    values = [value for stage in stages if (value := _kl(stage["metrics"])) is not None]
    return Line("KL", [float(number) for number in range(len(values))], values)


def _kl(metrics: Mapping[str, Any]) -> float | None:
    """What a stage says the model's KL is when it is done."""
    names = ("kl", "kl_refit", "kl_merged", "kl_adapter", "kl_after")
    found = next((metrics[name] for name in names if _is_number(metrics.get(name))), None)
    return None if found is None else max(float(found), 1e-12)


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            if isinstance(item, dict):
                found.append(item)
    except ValueError as error:
        raise MismatchError(f"{file} is damaged: {error}") from None
    return found
