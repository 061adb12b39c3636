"""Learning curves as tables."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from a1q.engine.curve import as_csv, columns

NAMES = st.sampled_from(["step", "total", "loss", "tune", "time", "kl", "a, b", 'quoted "name"'])
LINES = st.lists(st.dictionaries(NAMES, st.integers() | st.floats(allow_nan=False, allow_infinity=False), min_size=1))


def test_columns_are_the_union_in_a_stable_order() -> None:
    lines = [{"time": 1.0, "kl": 1, "step": 1}, {"loss": 2, "tune": 1, "norm": 3, "total": 4, "time": 2.0}]
    assert columns(lines) == ["step", "total", "loss", "tune", "kl", "norm", "time"]


def test_cells_that_are_missing_or_not_finite_are_empty() -> None:
    assert as_csv([{"step": 1, "loss": None}, {"step": 2, "tune": 0.5}]) == "step,loss,tune\n1,,\n2,,0.5\n"
    assert as_csv([{"step": 1, "layers": [1, 2], "kept": True}]) == 'step,layers,kept\n1,"[1, 2]",true\n'


@given(LINES)
def test_every_number_comes_back_exactly(lines: list[dict[str, float]]) -> None:
    table = list(csv.DictReader(io.StringIO(as_csv(lines), newline="")))
    assert [{name: float(cell) for name, cell in row.items() if cell} for row in table] == [
        {name: float(value) for name, value in line.items()} for line in lines
    ]
