"""`a1q schema`: one JSON Schema for editors."""

import json

from jsonschema import Draft202012Validator

from tests.cli.support import PLUGIN, a1q


def test_it_is_a_schema_without_our_own_keywords():
    result = a1q("schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    Draft202012Validator.check_schema(schema)
    assert '"x-plugin"' not in result.stdout and '"x-a1q"' not in result.stdout
    assert {"quantize", "export"} <= schema["properties"]["stages"]["items"]["properties"].keys()


def test_plugins_are_part_of_it():
    schema = json.loads(a1q("schema", "--plugin", PLUGIN).stdout)
    recipe = {"a1q": 1, "name": "x", "stages": [{"begin": {"value": 1}}]}
    assert list(Draft202012Validator(schema).iter_errors(recipe)) == []
