"""`a1q describe`: a page about a stage, scheme or exporter, from its schema."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from a1q.cli.common import json_option, plugin_option, print_json
from a1q.errors import UsageError

WIDTH = 100
FAMILIES = ("stages", "schemes", "exporters")


@click.command(
    epilog="""\b
Examples:
  a1q describe train
  a1q describe lut_lowrank
  a1q describe recipe          the keys outside of stages
"""
)
@click.argument("name")
@plugin_option
@json_option
def command(name: str, plugins: tuple[Path, ...], as_json: bool) -> None:
    """Describe a stage, scheme or exporter: what it does, and every option with its type and default.

    NAME may also be `recipe`. With --json, the schema itself.
    """
    from a1q.engine.registry import load_registry
    from a1q.recipe.paths import suggest
    from a1q.recipe.validate import recipe_schema

    registry = load_registry(plugins)
    found = {family: registry.schema(family, name) for family in FAMILIES if name in registry.names(family)}
    if name == "recipe":
        found["recipe"] = recipe_schema()
    if not found:
        known = ["recipe", *(item for family in FAMILIES for item in registry.names(family))]
        raise UsageError(f"there is nothing called {name!r}; {suggest(name, known)}")
    if as_json:
        print_json(found)
        return
    click.echo("\n\n".join("\n".join(page(name, family, schema)) for family, schema in found.items()))


def page(name: str, kind: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the page about one schema."""
    yield name if kind == "recipe" else f"{name} ({kind.removesuffix('s')})"
    yield from _wrapped(schema.get("description", ""), "  ")
    about = schema.get("x-a1q", {})
    for item, spec in about.get("inputs", {}).items():
        yield f"  takes {item}: {_input(spec)}"
    if "output" in about:
        yield f"  makes: {about['output']}"
    for dotted, rule, required in options(schema, schema, ""):
        yield ""
        yield f"  {dotted}: {_type(schema, rule)}{_default(rule, required)}"
        yield from _wrapped(rule.get("description", ""), "      ")
    if schema.get("x-plugin"):
        yield ""
        family = schema["x-plugin"]
        yield f"  All other options are those of the {family.removesuffix('s')}; `a1q ls {family}` lists them."


def options(root: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, bool]]:
    """Every option of a schema, nested ones by dotted path: (path, its rule, whether it is required)."""
    for name, rule in schema.get("properties", {}).items():
        rule = _resolved(root, rule)
        yield prefix + name, rule, name in schema.get("required", ())
        yield from options(root, rule, f"{prefix}{name}.")
    others = schema.get("additionalProperties")
    if isinstance(others, Mapping) and prefix:
        yield from options(root, _resolved(root, others), f"{prefix}NAME.")


def _resolved(root: Mapping[str, Any], rule: Mapping[str, Any]) -> Mapping[str, Any]:
    from a1q.recipe.schema import resolve_reference

    return {**resolve_reference(root, rule["$ref"]), **rule} if "$ref" in rule else rule


def _input(spec: Mapping[str, Any]) -> str:
    where = "`from`" if spec["at"] == "from" else f"`{spec['at']}`"
    text = f"an artifact of kind {spec['kind']}, named by {where}"
    if spec.get("default") == "source":
        return f"{text}; default: the recipe's model"
    if spec["at"] == "from" or spec.get("default") == "nearest":
        return f"{text}; default: the nearest earlier one"
    return f"{text}; optional" if spec.get("optional") else text


def _type(root: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    from a1q.recipe.schema import bounds, expected

    text = ", ".join([expected(rule), *bounds(rule)])
    items = rule.get("items")
    if isinstance(items, Mapping) and items:
        text += f", each {expected(_resolved(root, items))}"
    others = rule.get("additionalProperties")
    if isinstance(others, Mapping) and others:
        text += f", each {expected(_resolved(root, others))}"
    return text


def _default(rule: Mapping[str, Any], required: bool) -> str:
    if required:
        return "  (required)"
    return f"  [{json.dumps(rule['default'], ensure_ascii=False)}]" if "default" in rule else ""


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
