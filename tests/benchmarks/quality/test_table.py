from __future__ import annotations

import json

import pytest

from benchmarks.quality import table
from benchmarks.quality.cells import LEARNING_RATES, Row
from benchmarks.quality.plot import draw
from benchmarks.quality.table import FILES, digits, judge, make_table, summarize
from benchmarks.quality.targets import Target

OURS, OTHER, TRAINED = Row("pico", "w2", "a1q"), Row("pico", "w2", "peer:autoround"), Row("pico", "w2-200", "seq")


def result(test: float | None, tune: float | None = 1.0, bpw: float = 2.1, fit: float = 10.0):
    return {
        "kl": {"tune": tune, "test": test},
        "top1": {"tune": 0.8, "test": 0.9},
        "bpw": bpw,
        "bits_per_parameter": 4.0,
        "seconds": {"fit": fit},
        "peak_bytes": 2**30,
        "machine": {"processor": "this one"},
    }


def results():
    found = {cell: result(0.01 * (1 + cell.seed)) for cell in OURS.cells((0, 1, 2), None)}
    found |= {cell: result(0.04, bpw=2.281, fit=40.0) for cell in OTHER.cells((0, 1, 2), None)}
    tunes = dict(zip(LEARNING_RATES, (0.4, 0.1, 0.2), strict=True))
    found |= {cell: result(0.5, tune=tunes[cell.lr]) for cell in TRAINED.grid()}
    return found


def test_a_row_is_the_mean_and_the_spread_of_its_seeds():
    found = summarize(OURS, results(), (0, 1, 2))
    assert found["kl"] == pytest.approx(0.02) and found["kl_spread"] == pytest.approx(0.01)
    assert found["seeds"] == [0, 1, 2] and found["lr"] is None


def test_a_trained_row_takes_the_rate_of_least_tune_and_tells_missing_seeds():
    found = summarize(TRAINED, results(), (0, 1, 2))
    assert found["lr"] == LEARNING_RATES[1] and (found["seeds"], found["of_seeds"]) == ([0], 3)
    assert found["kl"] == 0.5 and found["kl_spread"] is None
    some = results()
    del some[TRAINED.grid()[0]]
    assert summarize(TRAINED, some, (0, 1, 2)) is None


@pytest.mark.parametrize(
    ("factor", "bpw", "figure", "met"),
    [(0.5, 2.1, "kl", True), (0.49, 2.1, "kl", False), (0.5, 2.05, "kl", False), (0.25, None, "fit", True)],
)
def test_a_target_asks_for_figure_and_bits(factor, bpw, figure, met):
    summaries = {row: summarize(row, results(), (0, 1, 2)) for row in (OURS, OTHER)}
    found = judge(Target("x", OURS, factor, OTHER, figure=figure, bpw=bpw), summaries)
    assert found["met"] is met and found["ratio"] == pytest.approx(0.5 if figure == "kl" else 0.25)


def test_what_was_not_measured_is_neither_met_nor_missed():
    found = judge(Target("x", OURS, 0.5, OTHER), {})
    assert found["met"] is None and found["ratio"] is None


def test_the_table_is_markdown_and_json_of_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "known_results", lambda seeds, check: results())
    monkeypatch.setattr(table, "LAYER", tmp_path / "none.json")
    text = make_table((0, 1, 2), folder=tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    lines = text.splitlines()
    assert "| a1q | 2.100 | 4.000 | 0.02000 | 0.01 | 0.500 | 0.9000 |  | 10.0 |  | 1.00 | 3 of 3 |" in lines
    first = next(line for line in lines if line.startswith("| 2 bit, rank 1, untrained"))
    assert "| 0.500 | 0.85 | yes |" in first
    assert {line.count("|") for line in lines if line.startswith("| a1q") or line.startswith("| method")} == {13}
    written = json.loads((tmp_path / "table.json").read_text())
    assert len(written["rows"]) == 3 and written["machines"] == [{"processor": "this one"}]
    assert written["targets"][0]["met"] is True and written["targets"][2]["met"] is None


@pytest.mark.parametrize(("value", "text"), [(0.0168, "0.01680"), (1.23456, "1.235"), (0.000512345, "0.0005123")])
def test_figures_have_four_significant_digits(value, text):
    assert digits(value) == text


def test_the_plot_is_drawn_twice_and_always_the_same(tmp_path):
    summaries = [summarize(row, results(), (0, 1, 2)) for row in (OURS, OTHER, TRAINED)]
    paths = draw(summaries, "pico", tmp_path)
    assert [path.name for path in paths] == ["kl.png", "kl.svg"]
    before = paths[1].read_bytes()
    draw(summaries, "pico", tmp_path)
    assert before == paths[1].read_bytes() and paths[0].stat().st_size > 10_000


def test_the_page_shows_the_targets_as_they_were_measured():
    table = (FILES / "table.md").read_text(encoding="utf-8")
    shown = (FILES.parents[2] / "docs" / "quality.md").read_text(encoding="utf-8")
    lines = [line for line in table[: table.index("\n## ", 1)].splitlines() if line.startswith("|")]
    assert len(lines) > 10 and not [line for line in lines if line not in shown.splitlines()]
