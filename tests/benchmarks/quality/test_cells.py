from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.quality import cells
from benchmarks.quality.cells import (
    LEARNING_RATES,
    Cell,
    Row,
    best_rate,
    key_of,
    read_result,
    rows,
    wanted,
    write_result,
)
from benchmarks.quality.configurations import CONFIGURATIONS
from benchmarks.quality.methods import METHODS
from benchmarks.quality.targets import TARGETS, reference_row

SEQ = Row("pico", "w2-200", "seq")


@pytest.fixture(autouse=True)
def cheap(tmp_path, monkeypatch):
    """Results in a folder of the test's, and digests without any text."""
    monkeypatch.setattr(cells, "FOLDER", tmp_path / "cells")
    monkeypatch.setattr(cells, "_teacher_digest", lambda name: f"teacher {name}")
    monkeypatch.setattr(cells, "_token_digest", lambda seed: f"tokens {seed}")
    monkeypatch.setattr(cells, "_held_out_digests", lambda: ["tune", "test"])


def result(tune: float | None, test: float = 1.0):
    return {"kl": {"tune": tune, "test": test}}


def test_names_are_unique_and_good_for_files():
    cells = {cell for row in rows() for cell in (row.grid() or row.cells((0, 1, 2), None))}
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) > 80
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for name in names)
    assert Cell("pico", "w2-200", "seq", 1, 3e-4).name == "pico.w2-200.seq.lr3e-04.seed1"


def test_every_target_and_reference_is_a_row():
    known = set(rows())
    for target in TARGETS:
        assert {target.ours, target.reference} <= known, target.name
    assert {reference_row(row.teacher, row.setting) for row in known if row.teacher == "pico"} <= known


def test_the_grid_is_searched_on_the_tune_side_and_the_best_rate_gets_the_other_seeds():
    grid = SEQ.grid()
    assert [cell.lr for cell in grid] == list(LEARNING_RATES) and {cell.seed for cell in grid} == {0}
    results = {cell: result(tune, test) for cell, tune, test in zip(grid, (4, 2, None), (1, 9, 1), strict=True)}
    assert best_rate(results, grid) == LEARNING_RATES[1]
    assert wanted(SEQ, (0, 1, 2), results)[3:] == [dataclasses.replace(grid[1], seed=seed) for seed in (1, 2)]
    del results[grid[2]]
    assert best_rate(results, grid) is None and wanted(SEQ, (0, 1, 2), results) == grid
    assert best_rate({cell: result(None) for cell in grid}, grid) is None


def test_ours_has_one_rate_for_all():
    row = Row("pico", "w2a4-200", "a1q")
    grid = row.grid()
    assert grid == Row("pico", "w2-200", "a1q").grid()
    results = {cell: result(tune) for cell, tune in zip(grid, (2, 1, 3), strict=True)}
    assert [cell for cell in wanted(row, (0, 1), results) if cell not in grid] == row.cells((0, 1), LEARNING_RATES[1])


def test_what_hangs_on_no_seed_runs_once():
    assert len(wanted(Row("pico", "w2", "rtn"), (0, 1, 2), {})) == 1
    assert len(wanted(Row("pico", "w2", "a1q"), (0, 1, 2), {})) == 3


def test_a_result_counts_only_while_its_key_is_the_same(monkeypatch):
    cell = Cell("pico", "w2", "a1q", 0)
    assert read_result(cell) is None
    write_result(cell, result(0.1))
    assert read_result(cell)["kl"]["tune"] == 0.1
    assert json.loads(cell.path.read_text())["parts"]["teacher"] == "teacher pico"
    monkeypatch.setattr(cells, "_token_digest", lambda seed: "others")
    assert read_result(cell) is None and read_result(cell, check=False) is not None
    cell.path.write_text("{")
    assert read_result(cell, check=False) is None


def test_the_key_follows_the_configuration_of_its_own_bits(monkeypatch):
    two, four = Cell("pico", "w2", "a1q", 0), Cell("pico", "w4", "a1q", 0)
    before = key_of(two), key_of(four)
    old = CONFIGURATIONS["a1q"]
    specs = {**old.specs, 4: {"*": {"scheme": "lut"}}}
    monkeypatch.setitem(CONFIGURATIONS, "a1q", dataclasses.replace(old, specs=specs, train={"lut": 1.0}))
    assert key_of(two) == before[0] and key_of(four) != before[1]


def test_keys_follow_seed_rate_version_and_options(monkeypatch):
    cell = SEQ.grid()[0]
    variants = [cell, dataclasses.replace(cell, seed=1), dataclasses.replace(cell, lr=1e-3)]
    keys = [key_of(item) for item in variants]
    monkeypatch.setitem(METHODS, "seq", dataclasses.replace(METHODS["seq"], version=2))
    keys.append(key_of(cell))
    monkeypatch.setitem(METHODS, "seq", dataclasses.replace(METHODS["seq"], options={"group_size": 32}))
    keys.append(key_of(cell))
    assert len(set(keys)) == 5
