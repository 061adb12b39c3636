"""`a1q plot`, and what of a run can be drawn."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from a1q.report.curves import charts_of
from tests.cli.support import a1q

pytestmark = pytest.mark.usefixtures("beside")


def test_every_chart_as_png_and_svg(looked: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = a1q("plot", "looked", "-o", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    names = {name.partition(".")[0] for name in written}
    assert {"trained-loss", "trained-lr", "trained-norm", "error-by-layer", "kl"} <= names
    assert written == sorted(f"{name}.{suffix}" for name in names for suffix in ("png", "svg"))
    assert [Path(line).name for line in sorted(result.output.split())] == written
    for path in (tmp_path / "plots").iterdir():
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "plots" / "trained-loss.svg").read_text()
    assert "trained: loss" in text and "held out" in text and "nats per token" in text
    again = a1q("plot", "looked", "-o", tmp_path / "again", "--stage", "trained", "--format", "svg")
    assert again.exit_code == 0
    for path in (tmp_path / "again").iterdir():
        assert path.name.startswith("trained-") and path.suffix == ".svg"
        assert path.read_bytes() == (tmp_path / "plots" / path.name).read_bytes()


def test_charts_hold_what_the_run_wrote(looked: Path) -> None:
    folder = looked / "runs" / "looked"
    report = json.loads((folder / "report.json").read_text())
    charts = {chart.name: chart for chart in charts_of(report, folder)}
    lines = [json.loads(line) for line in (folder / "metrics" / "trained.jsonl").read_text().splitlines()]
    loss, tune = charts["trained-loss"].lines
    assert list(loss.y) == [line["loss"] for line in lines if "loss" in line] and list(loss.x) == [1, 2, 3, 4]
    assert set(tune.y) <= {line.get("tune") for line in lines} and len(tune.y) <= 3
    fitted = next(item for item in report["stages"] if item["id"] == "fitted")["metrics"]
    errors = charts["error-by-layer"].lines[0]
    assert (list(errors.x), list(errors.y)) == ([0.0, 1.0], [fitted["error_by_layer"][layer] for layer in "01"])
    low, high = min(fitted["error"].values()), max(fitted["error"].values())
    assert all(low <= value <= high for value in errors.y)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("lookd",), 2, "lookd is no run folder"),
        (("looked", "--stage", "traind"), 2, "did you mean trained?"),
        (("looked", "--stage", "hf"), 3, "nothing to draw: the stages chosen, hf, neither trained nor quantized"),
        (("looked", "--format", "pdf"), 2, "pdf"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    result = a1q("plot", *arguments, "-o", tmp_path / "plots")
    assert result.exit_code == code and words in result.output
    assert not (tmp_path / "plots").exists()


def test_a_stage_that_quantized(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert a1q("plot", "looked", "--stage", "fitted", "-o", tmp_path / "plots").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["error-by-layer.png", "error-by-layer.svg"]


def test_a_run_without_curves(looked: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    report = json.loads((looked / "runs" / "looked" / "report.json").read_text())
    report["stages"] = [item for item in report["stages"] if item["id"] == "teacher"]
    (run / "report.json").write_text(json.dumps(report))
    result = a1q("plot", run)
    assert result.exit_code == 3 and "nothing to draw: no stage of it trained or quantized" in result.output
    assert [path.name for path in run.iterdir()] == ["report.json"]


def test_places_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        result = a1q("plot", "looked", "-o", place)
        assert result.exit_code == 2 and "file" in result.output and "Traceback" not in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = a1q("plot", "looked", "-o", tmp_path / "plots")
    assert result.exit_code == 3 and "pip install 'a1q[plots]'" in result.output
    assert not (tmp_path / "plots").exists()


def test_damaged_curves_are_named(looked: Path, tmp_path: Path) -> None:
    run = shutil.copytree(looked / "runs" / "looked", tmp_path / "run")
    (run / "metrics" / "trained.jsonl").write_text('{"step": 1\n')
    result = a1q("plot", run)
    assert result.exit_code == 3 and "trained.jsonl is damaged" in result.output
