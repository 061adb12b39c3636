"""`a1q describe`: a page with every option."""

import json

import pytest

from a1q.engine.registry import FAMILIES, Registry
from tests.cli.support import PLUGIN, a1q

REGISTRY = Registry()
NAMES = [(family, name) for family in FAMILIES for name in REGISTRY.names(family)]


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_every_option_is_on_the_page(family, name):
    result = a1q("describe", name)
    assert result.exit_code == 0, result.output
    for option, rule in REGISTRY.schema(family, name).get("properties", {}).items():
        assert f"\n  {option}: " in result.output
        assert " ".join(rule["description"].split())[:40] in " ".join(result.output.split())


def test_types_defaults_and_nested_options():
    text = a1q("describe", "train").output
    assert "train (stage)" in text
    assert "takes teacher: an artifact of kind teacher, named by `objective.kd`" in text
    assert "makes: model" in text
    assert "  steps: a whole number, at least 1, at most 1000000000  [200]" in text
    assert "  objective: a mapping  (required)" in text
    assert "  lr.weights: a number, more than 0, at most 10  [0.03]" in text
    assert "  keep: one of best, last" in text


def test_the_root_of_a_recipe():
    text = a1q("describe", "recipe").output
    assert "  runtime.device: one of auto, cpu, cuda, mps" in text
    assert "  groups.NAME.match: text  (required)" in text


def test_json_is_the_schema_itself():
    assert json.loads(a1q("describe", "snap", "--json").stdout) == {"stages": REGISTRY.schema("stages", "snap")}


def test_plugins_can_be_described():
    assert "begin (stage)" in a1q("describe", "begin", "--plugin", PLUGIN).output


def test_an_unknown_name_gets_the_nearest():
    result = a1q("describe", "quantise")
    assert result.exit_code == 2
    assert "did you mean 'quantize'?" in result.output
