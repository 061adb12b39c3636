from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import cells, layer
from benchmarks.quality.cells import LEARNING_RATES, Row
from benchmarks.quality.table import digits

BEST = LEARNING_RATES[1]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Processes that write a result at once; the names of those that ran."""
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cells, "FOLDER", tmp_path / "cells")
    for name in ("_teacher_digest", "_token_digest"):
        monkeypatch.setattr(cells, name, str)
    monkeypatch.setattr(cells, "_held_out_digests", lambda: [])
    monkeypatch.setattr(layer, "LAYER", tmp_path / "layer.json")
    names: list[str] = []

    def run(name, module):
        names.append(name)
        teacher, setting, method, seed, *lr = module[1:]
        cell = cells.Cell(teacher, setting, method, int(seed), float(lr[0]) if lr else None)
        tune = abs(cell.lr - BEST) if cell.lr else 0.5
        cells.write_result(cell, {"kl": {"tune": tune, "test": 0.5}, "bpw": 2.0})
        return True

    monkeypatch.setattr(command, "run_process", run)
    return names


def test_the_grid_runs_first_and_the_best_rate_gets_all_seeds(ran):
    assert command.run_row(Row("pico", "w2-200", "seq"), (0, 1, 2), command.Choice(None)) == []
    assert ran[:3] == [f"pico.w2-200.seq.lr{lr:.0e}.seed0" for lr in LEARNING_RATES]
    assert ran[3:] == [f"pico.w2-200.seq.lr{BEST:.0e}.seed{seed}" for seed in (1, 2)]


def test_rows_with_one_grid_run_its_cells_once_side_by_side(ran, monkeypatch):
    quick = command.run_process

    def slow(name, module):
        time.sleep(0.05)
        return quick(name, module)

    monkeypatch.setattr(command, "run_process", slow)
    rows = [Row("pico", "w2-200", "a1q"), Row("pico", "w2a4-200", "a1q")]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda row: command.run_row(row, (0,), command.Choice(None)), rows)) == [[], []]
    assert len(set(ran)) == len(ran) == len(LEARNING_RATES) + 1


def test_what_is_there_is_not_run_again(ran):
    row = Row("pico", "w2", "a1q")
    command.run_row(row, (0, 1), command.Choice(None))
    command.run_row(row, (0, 1, 2), command.Choice(None))
    assert ran == [f"pico.w2.a1q.seed{seed}" for seed in (0, 1, 2)]


def test_one_cell_runs_alone(ran, capsys):
    name = f"pico.w2-200.seq.lr{LEARNING_RATES[1]:.0e}.seed0"
    command.run_row(Row("pico", "w2-200", "seq"), (0, 1, 2), command.Choice([name]))
    assert ran == [name]
    assert "its learning rate is not chosen without pico.w2-200.seq.lr3e-04.seed0" in capsys.readouterr().out


def test_a_failure_is_named_and_ends_its_row(ran, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "run_process", lambda name, module: False)
    monkeypatch.setattr("benchmarks.quality.table.FILES", tmp_path)
    monkeypatch.setattr("benchmarks.quality.plot.FILES", tmp_path)
    monkeypatch.setattr("benchmarks.quality.plot.draw", lambda *arguments: [])
    assert command.main(["--only", "pico.w2.a1q", "pico.w2.rtn"]) == 1
    assert "failed: pico.w2.a1q.seed0\nfailed: pico.w2.rtn.seed0" in capsys.readouterr().err


def test_a_process_that_fails_shows_its_last_words(capsys):
    assert command.run_process("nix", ["benchmarks.quality.nothing"]) is False
    assert "No module named benchmarks.quality.nothing" in capsys.readouterr().out


def test_the_list_says_what_is_missing(ran, capsys):
    command.run_row(Row("pico", "w2", "rtn"), (0,), command.Choice(None))
    capsys.readouterr()
    assert command.main(["--list", "--only", "pico.w2.rtn", "pico.w2.a1q-lut"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["pico.w2.a1q-lut.seed0", "pico.w2.rtn.seed0"]
    assert lines[0].endswith("missing") and lines[1].endswith(f"KL {digits(0.5)} (tune) {digits(0.5)} (test)")


def test_a_pattern_that_matches_nothing_is_told(ran, capsys):
    assert command.main(["--only", "pico.w2.a2q"]) == 2
    assert "nothing is called pico.w2.a2q" in capsys.readouterr().err
