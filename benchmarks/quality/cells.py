"""The cells: which there are, what determines each one, and their results on disk.

A cell is one run: teacher, setting, method, seed and, where it trains, a learning rate of the one grid. The grid is
searched with the first seed on the tune side; the best rate there then runs with the other seeds. Others' methods get
the best rate of every row; ours keep the one that was best in a single row.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.quality.methods import METHODS
from benchmarks.quality.protocol import LENGTH, SEEDS, SIDES, digest_of, held_out, seed_tokens, versions
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.teachers import TEACHERS, teacher_folder

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
"""Of the parameter set that a method names first; the grid of every trained method."""
FOLDER = RESULTS / "quality" / "cells"


@dataclass(frozen=True)
class Cell:
    """One run."""

    teacher: str
    setting: str
    method: str
    seed: int
    lr: float | None = None

    @property
    def name(self) -> str:
        """`pico.w2-200.seq.lr1e-03.seed0`, also the name of its file."""
        rate = [] if self.lr is None else [f"lr{self.lr:.0e}"]
        return ".".join([self.teacher, self.setting, self.method.replace(":", "-"), *rate, f"seed{self.seed}"])

    @property
    def path(self) -> Path:
        """Where its result lies."""
        return FOLDER / f"{self.name}.json"


@dataclass(frozen=True)
class Row:
    """The cells of one row of the table: all seeds, and the grid where the method trains."""

    teacher: str
    setting: str
    method: str

    @property
    def name(self) -> str:
        """`pico.w2-200.seq`"""
        return f"{self.teacher}.{self.setting}.{self.method.replace(':', '-')}"

    def grid(self) -> list[Cell]:
        """The first seed at every learning rate, in the row where the method's rate is chosen; empty if none trains."""
        method = METHODS[self.method]
        if not method.trains(self.setting):
            return []
        place = method.tuned_at or (self.teacher, self.setting, self.method)
        return [Cell(*place, SEEDS[0], lr) for lr in LEARNING_RATES]

    def cells(self, seeds: Sequence[int], lr: float | None) -> list[Cell]:
        """Those that are reported, at the learning rate chosen; one for a method without a seed."""
        used = seeds if METHODS[self.method].seeded(self.setting) else SEEDS[:1]
        return [Cell(self.teacher, self.setting, self.method, seed, lr) for seed in used]


def rows() -> list[Row]:
    """Every row there is, the cheap and decisive ones first."""
    found = [
        Row(teacher, setting, method)
        for teacher in TEACHERS
        for setting in SETTINGS
        for method in METHODS
        if METHODS[method].takes_part(teacher, setting)
    ]
    return sorted(found, key=lambda row: (SETTINGS[row.setting].steps, TEACHERS.index(row.teacher)))


def best_rate(results: Mapping[Cell, Mapping[str, Any]], grid: Iterable[Cell]) -> float | None:
    """The learning rate of least KL on the tune side; None while a cell of the grid is missing."""
    grid = list(grid)
    if any(cell not in results for cell in grid):
        return None
    finite = [cell for cell in grid if results[cell]["kl"]["tune"] is not None]
    return min(finite, key=lambda cell: results[cell]["kl"]["tune"]).lr if finite else None


def wanted(row: Row, seeds: Sequence[int], results: Mapping[Cell, Mapping[str, Any]]) -> list[Cell]:
    """The cells of a row that can be named by now, grid first."""
    grid = row.grid()
    if not grid:
        return row.cells(seeds, None)
    lr = best_rate(results, grid)
    return grid if lr is None else list(dict.fromkeys([*grid, *row.cells(seeds, lr)]))


# -- what determines a cell ----------------------------------------------------------------------------------------
def key_parts(cell: Cell) -> dict[str, Any]:
    """Everything that its figures hang on, as JSON holds it."""
    found = {
        "cell": [cell.teacher, cell.setting, cell.method, cell.seed, cell.lr],
        "length": LENGTH,
        "steps": SETTINGS[cell.setting].steps,
        "method": METHODS[cell.method].identity(cell.setting),
        "teacher": _teacher_digest(cell.teacher),
        "tokens": _token_digest(cell.seed),
        "judged on": _held_out_digests(),
        "packages": versions(),
    }
    return json.loads(json.dumps(found))


def key_of(cell: Cell) -> str:
    """sha256 of `key_parts`."""
    from a1q.engine.artifact import canonical_json, sha256_bytes

    return sha256_bytes(canonical_json(key_parts(cell)))


@functools.cache
def _teacher_digest(name: str) -> str:
    from a1q.models.source import resolve_source

    return resolve_source(str(teacher_folder(name)) if name != "pico" else "builtin:pico").digest


@functools.cache
def _token_digest(seed: int) -> str:
    return seed_tokens(teacher_folder("pico"), seed).digest


@functools.cache
def _held_out_digests() -> list[str]:
    return [digest_of(held_out(teacher_folder("pico"), side)) for side in SIDES]


# -- results -------------------------------------------------------------------------------------------------------
def read_result(cell: Cell, check: bool = True) -> dict[str, Any] | None:
    """The result on disk; with `check`, None unless its key is the cell's key of today."""
    try:
        found = json.loads(cell.path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if not check or found.get("key") == key_of(cell) else None


def write_result(cell: Cell, result: Mapping[str, Any]) -> None:
    """Put a result in place, whole or not at all."""
    from a1q.engine.files import write_atomic

    cell.path.parent.mkdir(parents=True, exist_ok=True)
    written = {"key": key_of(cell), "parts": key_parts(cell), **result}
    write_atomic(cell.path, json.dumps(written, indent=2, allow_nan=False) + "\n")
