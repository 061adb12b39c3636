"""What of a run is drawn, from made-up reports and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.errors import MismatchError
from a1q.report.curves import Chart, charts_of, labels_of


def stage(name: str, kind: str, **metrics: Any) -> dict[str, Any]:
    return {"id": name, "stage": kind, "metrics": metrics}


def charts(folder: Path, stages: list[dict[str, Any]], steps: dict[str, list[dict[str, Any]]]) -> dict[str, Chart]:
    (folder / "metrics").mkdir(exist_ok=True)
    for name, lines in steps.items():
        (folder / "metrics" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {chart.name: chart for chart in charts_of({"stages": stages}, folder)}


def test_a_stage_that_trained(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 0.5, "lr": 0.1, "tune": 0.6},
        {"step": 2, "loss": None, "lr": 0.2, "tune": 0.6},  # a step that was skipped has no loss
        {"step": 3, "loss": 0.4, "lr": 0.1, "tune": 0.45},
    ]
    found = charts(tmp_path, [stage("t", "train"), stage("x", "snap")], {"t": lines})
    assert list(found) == ["t-loss", "t-lr"]
    loss, tune = found["t-loss"].lines
    assert (list(loss.x), list(loss.y)) == ([1, 3], [0.5, 0.4]) and not loss.marked
    assert (list(tune.x), list(tune.y)) == ([1, 3], [0.6, 0.45]) and tune.marked
    assert found["t-loss"].y == "nats per token" and not found["t-loss"].logarithmic


@pytest.mark.parametrize(
    ("values", "logarithmic"), [([1.0, 0.2], False), ([1.0, 0.09], True), ([1.0, 0.0], False), ([-1.0, 100.0], False)]
)
def test_a_logarithm_only_where_nothing_else_shows_all(tmp_path: Path, values: list[float], logarithmic: bool) -> None:
    lines = [{"step": number, "loss": value} for number, value in enumerate(values)]
    found = charts(tmp_path, [stage("q", "quantize")], {"q": lines})
    assert found["q-loss"].logarithmic is logarithmic and found["q-loss"].y == "relative error"


def test_stages_together(tmp_path: Path) -> None:
    stages = [
        stage("q", "quantize", error_by_layer={"10": 0.3, "2": 0.2, "0": 0.1}, kl_after=0.04),
        stage("nothing", "export"),
        stage("t", "train", kl_before=0.04, kl_after=0.01),
        stage("e", "eval", kl=0.02),
    ]
    found = charts(tmp_path, stages, {})
    assert list(found) == ["error-by-layer", "kl"]
    (line,) = found["error-by-layer"].lines
    assert (line.label, list(line.x), list(line.y)) == ("q", [0, 2, 10], [0.1, 0.2, 0.3])
    assert list(found["kl"].lines[0].y) == [0.04, 0.01, 0.02]
    assert labels_of({"stages": stages}) == ["q", "t", "e"]
    assert charts(tmp_path, stages[2:3], {}) == {}  # one point is no curve


@given(st.lists(st.one_of(st.none(), st.booleans(), st.text(), st.floats(), st.integers(-9, 9)), max_size=6))
def test_no_line_has_a_point_that_is_no_number(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    lines = [{"step": number, "loss": value, "tune": value} for number, value in enumerate(values)]
    found = charts(tmp_path_factory.mktemp("run"), [stage("t", "train")], {"t": lines})
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e400]
    assert ("t-loss" in found) == (len(numbers) > 1)
    if found:
        assert list(found["t-loss"].lines[0].y) == numbers


@pytest.mark.parametrize("content", ['{"step": 1', "\x00", "[1,"])
def test_damage_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "t.jsonl").write_text(content)
    with pytest.raises(MismatchError, match=r"t\.jsonl is damaged"):
        charts_of({"stages": [stage("t", "train")]}, tmp_path)
