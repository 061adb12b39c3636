"""A learning curve for spreadsheets: what a stage's progress lines hold, as one table of comma-separated values."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

FIRST = ("step", "total", "loss", "tune")
LAST = ("time",)


def columns(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every name that a line has: `FIRST`, then others in the order in which they first appear, then `LAST`."""
    names = dict.fromkeys(name for line in lines for name in line)
    middle = [name for name in names if name not in FIRST + LAST]
    return [*(name for name in FIRST if name in names), *middle, *(name for name in LAST if name in names)]


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """A head and one row a line. What a line lacks, or has as null (a figure that was not finite), is an empty cell."""
    head = columns(lines)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_cell(line.get(name)) for name in head] for line in lines)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | bool) else value
