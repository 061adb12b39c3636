"""What allocate chose, as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from a1q.report.rules import by_group, by_module, rules_of
from a1q.report.summary import summary

CANDIDATES = [
    {"scheme": {"scheme": "lut", "bits": 2}, "text": "lut 2 bit", "bits": 32, "kl": 0.5},
    {"scheme": {"scheme": "lut", "bits": 4}, "text": "lut 4 bit", "bits": 64, "kl": 0.25},
]
RULES = {
    "budget": {"bits_per_param": 3.5, "bytes": 1_500_000},
    "reached": {"bits_per_param": 3.25, "bytes": 1_400_000},
    "kl": {"predicted": 0.75, "measured": 0.875, "bound": 0.625},
    "modules": {
        name: {"group": "mlp", "shape": [4, 4], "candidates": CANDIDATES, **CANDIDATES[index]}
        for index, name in enumerate(("layers.0.up", "layers.1.up"))
    },
}
STAGE = {"id": "budget", "stage": "allocate", "kind": "rules", "cache": "miss", "seconds": 1.0, "metrics": {}}


def words(line: str) -> str:
    return " ".join(line.split())


def test_groups_and_sums() -> None:
    lines = by_group(RULES).splitlines()
    assert words(lines[2]) == "mlp 2 3.000 0.75 1 x lut 2 bit, 1 x lut 4 bit"
    assert lines[3] == "3.2500 of 3.5000 bits per parameter, 1.4 of 1.5 MB"
    assert lines[4].startswith("KL 0.75 predicted, 0.875 measured") and lines[4].endswith("below 0.625")


def test_modules_with_all_that_was_measured() -> None:
    lines = by_module(RULES).splitlines()
    assert words(lines[2]) == "layers.0.up lut 2 bit 2.000 0.5 2.00: 0.5, 4.00: 0.25"
    assert words(lines[3]) == "layers.1.up lut 4 bit 4.000 0.25 2.00: 0.5, 4.00: 0.25"


@pytest.mark.parametrize("text", [None, "{", "{}", json.dumps({"budget": 1})])
def test_a_missing_or_damaged_file_is_passed_over(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "rules" / "budget").mkdir(parents=True)
    if text is not None:
        (tmp_path / "rules" / "budget" / "rules.json").write_text(text)
    assert rules_of(tmp_path, STAGE) == {}


def test_the_closing_table_shows_them(tmp_path: Path) -> None:
    (tmp_path / "rules" / "budget").mkdir(parents=True)
    (tmp_path / "rules" / "budget" / "rules.json").write_text(json.dumps(RULES))
    report: dict[str, Any] = {"status": "done", "error": None, "stages": [STAGE], "exports": {}}
    text = summary(report, tmp_path)
    assert f"budget chose, and {tmp_path / 'rules' / 'budget'} has it to pin:" in text
    assert by_group(RULES) in text
    assert rules_of(tmp_path, {**STAGE, "kind": "model"}) == {}
