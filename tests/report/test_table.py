"""Tables, figures, durations, sizes."""

from __future__ import annotations

from typing import Any

import pytest

from a1q.report.table import about, duration, figure, size, table


def test_columns_are_aligned_and_no_line_ends_in_blanks() -> None:
    text = table(["name", "bytes"], [["a", "1"], ["longer", "1,000"]], right=[1])
    assert text.splitlines() == ["name    bytes", "------  -----", "a           1", "longer  1,000"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.01235"), (2048, "2,048"), (123456.7, "123,457"), (1e-7, "1e-07"), (None, "not finite"), ("x", "x")],
)
def test_figure(value: Any, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.44, "0.4 s"), (59.9, "59.9 s"), (65, "1:05"), (7390, "2:03:10")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (720, "12 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_about(seconds: float, text: str) -> None:
    assert about(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (3_700_000, "3.7 MB"), (5e12, "5.0 TB")])
def test_size(count: float, text: str) -> None:
    assert size(count) == text
