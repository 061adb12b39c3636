"""Every shipped schema is complete, and every plug-in's Config has exactly its schema's properties."""

import dataclasses
import importlib
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from a1q.engine.registry import FAMILIES, Registry, schema_folder
from a1q.recipe import shipped_recipes
from a1q.recipe.composed import composed_schema
from a1q.recipe.schema import Checker, resolve_reference
from a1q.recipe.text import parse_recipe
from a1q.recipe.validate import recipe_schema

REGISTRY = Registry()
SHIPPED = [(family, name) for family in FAMILIES for name in REGISTRY.names(family)]
NAMES = [f"{family}/{name}" for family, name in SHIPPED]


def properties(schema, root=None, path=""):
    """Every property below a schema: (dotted path, its rule, whether it is required)."""
    root = root or schema
    for name, rule in schema.get("properties", {}).items():
        full = {**resolve_reference(root, rule["$ref"]), **rule} if "$ref" in rule else rule
        yield path + name, full, name in schema.get("required", ())
        yield from properties(full, root, f"{path}{name}.")
    others = schema.get("additionalProperties")
    if isinstance(others, dict):
        yield from properties(others, root, f"{path}*.")


@pytest.mark.parametrize(("family", "name"), SHIPPED, ids=NAMES)
def test_schemas_are_complete(family, name):
    schema = REGISTRY.schema(family, name)
    Draft202012Validator.check_schema(schema)
    assert schema["title"] == name
    assert schema["description"]
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    for path, rule, required in properties(schema):
        assert rule.get("description"), f"{path} has no description"
        inside_gate = "*." in path
        assert required or inside_gate or "default" in rule, f"{path} is optional and has no default"


def test_the_root_schema_is_complete():
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    without_default = {"stages", "use", "set", "unset"}
    for path, rule, required in properties(schema):
        assert rule.get("description"), f"{path} has no description"
        assert required or path in without_default or "default" in rule, f"{path} is optional and has no default"


@pytest.mark.parametrize(("family", "name"), SHIPPED, ids=NAMES)
def test_defaults_and_smoke_options_are_valid(family, name):
    schema = REGISTRY.schema(family, name)
    for path, rule, required in properties(schema):
        if "default" in rule and not required:
            assert Checker(REGISTRY).check({**rule, "$defs": schema.get("$defs", {})}, rule["default"]) == [], path
    rules = {path: rule for path, rule, _ in properties(schema)}
    for path, value in schema.get("x-a1q", {}).get("smoke", {}).items():
        assert Checker(REGISTRY).check(rules[path], value) == [], path


@pytest.mark.parametrize(("family", "name"), SHIPPED, ids=NAMES)
def test_about_blocks_point_to_options_that_exist(family, name):
    schema = REGISTRY.schema(family, name)
    about = schema.get("x-a1q", {})
    known = {path for path, _, _ in properties(schema)} | {"from"}
    assert family != "stages" or about["output"]
    assert {item["at"] for item in about.get("inputs", {}).values()} <= known
    assert set(about.get("data", ())) <= known


@pytest.mark.parametrize(("family", "name"), SHIPPED, ids=NAMES)
def test_config_fields_are_the_schemas_properties(family, name):
    schema = REGISTRY.schema(family, name)
    config = REGISTRY.get(family, name).Config
    if schema.get("x-plugin"):
        # the plug-in's own options arrive typed, in the field `options`
        schema = {**schema, "properties": {**schema["properties"], "options": {}}}
    same_fields(config, schema, name)


def same_fields(config, schema, path):
    assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen, path
    fields = dataclasses.fields(config)
    assert {field.name for field in fields} == set(schema.get("properties", {})), path
    for field in fields:
        assert field.default is dataclasses.MISSING, f"{path}.{field.name} has a default in code"
        assert field.default_factory is dataclasses.MISSING, f"{path}.{field.name} has a default in code"
        hint = typing.get_type_hints(config)[field.name]
        for nested in (item for item in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(item)):
            same_fields(nested, schema["properties"][field.name], f"{path}.{field.name}")


def test_every_plugin_has_its_two_files():
    for family, kind in FAMILIES.items():
        folder = Path(importlib.import_module(kind.module).__file__).parent
        code = {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")}
        assert code == {path.stem for path in (schema_folder() / family).glob("*.json")}


@pytest.mark.parametrize("module", [f"{FAMILIES[family].module}.{name}" for family, name in SHIPPED])
def test_plugins_import_nothing_heavy(module):
    assert loaded_by(f"import {module}") == []


def loaded_by(code):
    """Which heavy packages a fresh Python has loaded after `code`."""
    heavy = ("torch", "transformers", "coremltools", "datasets", "peft", "tokenizers")
    check = f"{code}\nimport sys, json\nprint(json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def composed():
    return Draft202012Validator(composed_schema(REGISTRY))


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_composed_schema_accepts_shipped_recipes(composed, name):
    path = shipped_recipes()[name]
    assert list(composed.iter_errors(parse_recipe(path.read_bytes(), name).plain())) == []


@pytest.mark.parametrize(
    "stage",
    [
        {"quantize": {"rules": {"mlp": {"scheme": "lut_lowrank", "bits": 5}}}},
        {"quantize": {"rules": {"mlp": {"scheme": "lut_lowrank", "bits": 4, "rnk": 1}}}},
        {"quantize": {"rules": {"mlp": {"scheme": "nothing"}}}},
        {"quantize": {"rules": {"mlp": {"bits": 4}}}},
        {"convert": {"rules": {"mlp": {"bitz": 4}}}},
        {"export": {"format": "nothing"}},
        {"export": {"format": "packed", "shard_size": "5GB"}},
        {"export": {}},
        {"snap": {}, "kd": {"data": "text"}},
        {"nothing": {}},
    ],
)
def test_the_composed_schema_refuses_what_we_refuse(composed, stage):
    recipe = {"a1q": 1, "name": "x", "stages": [stage]}
    assert list(composed.iter_errors(recipe))
    good = {"a1q": 1, "name": "x", "stages": [{"export": {"format": "packed", "from": "q"}}, {"snap": None}]}
    assert list(composed.iter_errors(good)) == []
