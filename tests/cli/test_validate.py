"""`a1q validate`, and that neither it nor `--help` loads anything heavy."""

import json
import subprocess
import sys

import pytest

from a1q.recipe import shipped_recipes
from tests.cli.support import a1q

HEAVY = ("torch", "transformers", "coremltools", "datasets", "peft", "tokenizers", "numpy")


def loaded_by(*arguments, heavy=HEAVY, setup=""):
    """Exit code of a command in a fresh process, and which of `heavy` it loaded."""
    code = (
        f"import sys, json\nfrom a1q.cli import main\n{setup}\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"print(json.dumps([code, [name for name in {heavy!r} if name in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid(name):
    result = a1q("validate", name)
    assert result.exit_code == 0, result.output
    assert "is a valid recipe" in result.output


def test_json_holds_the_resolved_recipe():
    result = a1q("validate", "q4_to_q2", "--json", "--set", "stages.q4_train.steps=7")
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert document["recipe"]["stages"][3]["train"]["steps"] == 7
    assert document["recipe"]["stages"][3]["train"]["schedule"] == "cosine"


def test_json_holds_the_problems():
    result = a1q("validate", "q4_to_q2", "--json", "--set", "stages.q4_train.stepz=7", "--set", "seed=x")
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert document["ok"] is False
    assert {problem["path"] for problem in document["problems"]} == {"stages.q4_train.stepz", "seed"}
    assert all(problem["file"].startswith("--set") for problem in document["problems"])


@pytest.mark.parametrize("arguments", [("validate", "q4_to_q2"), ("--help",), ("ls", "stages"), ("describe", "train")])
def test_nothing_heavy_is_loaded(arguments):
    assert loaded_by(*arguments) == [0, []]
