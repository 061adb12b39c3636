"""`a1q show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.support import PLUGIN, RECIPE, a1q


@pytest.fixture(autouse=True)
def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("numbers.yaml").write_text(RECIPE)
    assert a1q("run", "numbers.yaml", "--plugin", PLUGIN).exit_code == 0


@pytest.mark.parametrize("name", ["numbers", "runs/numbers"])
def test_a_run_by_name_and_by_folder(name: str) -> None:
    shown = a1q("show", name)
    assert shown.exit_code == 0, shown.output
    for text in ("numbers, seed 7", "more", "total: 3", "export box: ", "done after", "Python 3."):
        assert text in shown.output


def test_json(tmp_path: Path) -> None:
    shown = json.loads(a1q("show", "numbers", "--json").output)
    assert shown["stages"][1]["metrics"] == {"total": 3, "steps": 5}
    assert shown["lock"]["packages"]["numpy"]


def test_what_is_no_run_is_told_with_the_known_ones(tmp_path: Path) -> None:
    shown = a1q("show", "nunbers")
    assert shown.exit_code == 2
    assert "nunbers is no run folder" in shown.output and str(tmp_path / "runs" / "numbers") in shown.output
