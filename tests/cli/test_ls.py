"""`a1q ls`: everything that has a name."""

import json

import pytest

from a1q.engine.registry import Registry
from a1q.recipe import shipped_recipes
from tests.cli.support import PLUGIN, RECIPE, a1q


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_all_kinds_with_a_line_each():
    result = a1q("ls")
    assert result.exit_code == 0
    assert [line for line in result.output.splitlines() if line.endswith(":")] == [
        "recipes:",
        "stages:",
        "schemes:",
        "exporters:",
        "runs:",
    ]
    assert "quantize" in result.output and "Quantize dense linear layers" in result.output


def test_json_and_one_kind():
    everything = json.loads(a1q("ls", "--json").stdout)
    registry = Registry()
    assert list(everything["stages"]) == registry.names("stages")
    assert list(everything["schemes"]) == registry.names("schemes")
    assert list(everything["exporters"]) == registry.names("exporters")
    assert list(everything["recipes"]) == list(shipped_recipes())
    assert json.loads(a1q("ls", "schemes", "--json").stdout) == {"schemes": everything["schemes"]}
    assert all(everything["stages"].values())


def test_plugins_and_runs_are_listed(tmp_path):
    (tmp_path / "numbers.yaml").write_text(RECIPE)
    assert "begin" in a1q("ls", "stages", "--plugin", PLUGIN).output
    assert a1q("run", "numbers.yaml", "--plugin", PLUGIN).exit_code == 0
    assert list(json.loads(a1q("ls", "runs", "--json").stdout)["runs"]) == [str(tmp_path / "runs" / "numbers")]


def test_an_unknown_kind():
    result = a1q("ls", "nothing")
    assert result.exit_code == 2
    assert "recipes" in result.output
