"""Check plain values against JSON Schemas with nested plug-ins, and fill in defaults.

`x-plugin` in a schema says that a mapping names a plug-in (`scheme:` for schemes, `format:` for exporters) whose own
schema governs the rest of it; see docs/architecture.md. `x-expected` says in words what is expected, and `x-hints` what
to do instead of certain values that one may think of. Everything else is JSON Schema 2020-12.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from a1q.engine.registry import Registry
from a1q.recipe.paths import Path, suggest
from a1q.recipe.text import kind_of

PLUGIN_KEYS = {"schemes": "scheme", "exporters": "format"}
"""The key of a mapping that names its plug-in."""
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
    "multipleOf": "a multiple of",
}


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a value; `path` leads to it from the value that was checked."""

    path: Path
    message: str
    hint: str = ""
    at_key: bool = False
    """Whether the key, not the value, is wrong."""


class Checker:
    """Checks and fills values against schemas, dispatching nested plug-ins through a registry."""

    def __init__(self, registry: Registry):
        self.registry = registry
        self._class = extend(
            Draft202012Validator, {"x-plugin": self._plugin, "additionalProperties": _additional_properties}
        )

    def check(self, schema: Mapping[str, Any], value: Any) -> list[Finding]:
        """Everything wrong with `value`, root causes only, at most one finding per place and key."""
        errors = list(self._class(schema).iter_errors(value))
        found = [finding for error in errors for finding in _findings(error)]
        misspelt = {(item.path[:-1], item.hint) for item in found if item.at_key}
        kept: dict[Path, Finding] = {}
        for item in found:
            if (item.path[:-1], f"did you mean {item.path[-1]!r}?" if item.path else "") in misspelt:
                continue  # the missing key is there, misspelt
            kept.setdefault(item.path, item)
        return list(kept.values())

    def fill(self, schema: Mapping[str, Any], value: Any, uses: set[tuple[str, str]]) -> Any:
        """A copy of a valid value with every default filled in and numbers in the type the schema says.

        Args:
            schema: what `value` was checked against.
            value: a plain value without findings.
            uses: receives (family, name) of every nested plug-in.
        """
        return self._fill(schema, schema, value, uses)

    def _fill(self, root: Mapping[str, Any], schema: Any, value: Any, uses: set[tuple[str, str]]) -> Any:
        if not isinstance(schema, Mapping):
            return value
        if "$ref" in schema:
            value = self._fill(root, resolve_reference(root, schema["$ref"]), value, uses)
        branches = schema.get("anyOf") or schema.get("oneOf") or ()
        for branch in branches:
            if self._class(root).evolve(schema=branch).is_valid(value):
                value = self._fill(root, branch, value, uses)
                break
        if isinstance(value, dict):
            return self._fill_mapping(root, schema, value, uses)
        if isinstance(value, list):
            return [self._fill(root, schema.get("items"), item, uses) for item in value]
        listed = schema.get("enum", ())
        if value in listed and not isinstance(value, bool):
            return listed[listed.index(value)]  # 2.0 is 2
        return _number(schema.get("type"), value)

    def _fill_mapping(
        self, root: Any, schema: Mapping[str, Any], value: dict[str, Any], uses: set[tuple[str, str]]
    ) -> Any:
        properties = schema.get("properties", {})
        others = schema.get("additionalProperties")
        filled = {name: self._fill(root, properties.get(name, others), item, uses) for name, item in value.items()}
        for name, rule in properties.items():
            if name not in filled and "default" in rule:
                filled[name] = self._fill(root, rule, copy.deepcopy(rule["default"]), uses)
        family = schema.get("x-plugin", "")
        name = filled.get(PLUGIN_KEYS[family]) if family else None
        if name is not None:
            uses.add((family, name))
            plugin = self.registry.schema(family, name)
            if schema.get("x-partial"):
                plugin = _without_defaults(plugin)
            own = {PLUGIN_KEYS[family], *properties}
            rest = {key: item for key, item in filled.items() if key not in own}
            filled |= self._fill(plugin, plugin, rest, uses)
        return filled

    def _plugin(self, validator: Any, family: str, value: Any, schema: Mapping[str, Any]) -> Iterator[ValidationError]:
        key = PLUGIN_KEYS[family]
        noun = family.removesuffix("s")
        if not isinstance(value, dict):
            if "type" not in schema:
                yield ValidationError(f"expected a mapping with `{key}`, found {kind_of(value)}", validator="x-plugin")
            return
        partial = bool(schema.get("x-partial"))
        name = value.get(key)
        rest = {item: value[item] for item in value if item != key and item not in schema.get("properties", {})}
        if key not in value:
            if partial:
                yield from self._partial(family, rest)
            elif key not in schema.get("required", ()):
                names = ", ".join(self.registry.names(family))
                yield ValidationError(
                    f"missing key {key!r}", validator="x-plugin", context=[], cause=_Hint(f"{family}: {names}")
                )
        elif not isinstance(name, str) or name not in self.registry.names(family):
            hint = suggest(str(name), self.registry.names(family), family)
            yield ValidationError(
                f"there is no {noun} {name!r}" if isinstance(name, str) else f"expected text, found {kind_of(name)}",
                validator="x-plugin",
                path=[key],
                cause=_Hint(hint),
            )
        else:
            plugin = self.registry.schema(family, name)
            plugin = {**plugin, "required": []} if partial else plugin
            yield from self._class(plugin).iter_errors(rest)

    def _partial(self, family: str, rest: dict[str, Any]) -> Iterator[ValidationError]:
        """Check options whose plug-in is not named here: each must suit at least one of the family."""
        schemas = [self.registry.schema(family, name) for name in self.registry.names(family)]
        known = sorted({key for schema in schemas for key in schema.get("properties", {})})
        for key, value in rest.items():
            candidates = [schema for schema in schemas if key in schema.get("properties", {})]
            outcomes = [
                list(self._class({**schema, "required": []}).iter_errors({key: value})) for schema in candidates
            ]
            if not candidates:
                yield _unknown_key(key, known)
            elif all(outcomes):
                yield from outcomes[0]


def expected(schema: Any) -> str:
    """What a schema accepts, in a user's words."""
    if not isinstance(schema, Mapping):
        return "another value"
    if "x-expected" in schema:
        return str(schema["x-expected"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join("null" if item is None else str(item) for item in schema["enum"])
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(dict.fromkeys(expected(branch) for branch in schema.get("anyOf") or schema["oneOf"]))
    if "x-plugin" in schema:
        return f"a mapping with `{PLUGIN_KEYS[schema['x-plugin']]}`"
    types = schema.get("type", "object")
    return " or ".join(_TYPES[name] for name in ([types] if isinstance(types, str) else types))


def bounds(schema: Mapping[str, Any]) -> list[str]:
    """The limits that a schema sets, in a user's words."""
    return [f"{words} {schema[key]}" for key, words in _BOUNDS.items() if key in schema]


def resolve_reference(root: Mapping[str, Any], reference: str) -> Any:
    """The subschema at a `#/...` reference."""
    node: Any = root
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


class _Hint(Exception):
    """Carries a hint through jsonschema's ValidationError."""


def _findings(error: ValidationError) -> list[Finding]:
    """A user's words for one error of jsonschema; the best branch of an alternative speaks for it."""
    if error.validator in ("anyOf", "oneOf") and error.context:
        branches: dict[Any, list[ValidationError]] = {}
        for item in error.context:
            branches.setdefault(item.schema_path[0], []).append(item)
        fitting = [items for items in branches.values() if not any(_wrong_kind(item) for item in items)]
        if fitting:
            return [finding for item in min(fitting, key=len) for finding in _findings(item)]
        wanted = expected({"anyOf": error.validator_value})
        near = suggest(error.instance, _choices(error.schema)) if isinstance(error.instance, str) else ""
        hint = near if near.startswith("did you mean") else _remedy(error.instance, wanted)
        return [Finding(_path(error), f"expected {wanted}, found {kind_of(error.instance)}", hint)]
    return [_finding(error)]


def _finding(error: ValidationError) -> Finding:
    path, found = _path(error), kind_of(error.instance)
    value: Any = error.instance
    wanted: Any = error.validator_value
    schema: Any = error.schema
    at_key = "propertyNames" in error.absolute_schema_path
    match error.validator:
        case "unknown-key":
            return Finding(path, error.message, str(error.cause or ""), at_key=True)
        case "x-plugin":
            return Finding(path, error.message, str(error.cause or ""))
        case "required":
            name = next((name for name in wanted if f"'{name}'" in error.message and name not in value), "")
            rule = schema.get("properties", {}).get(name, {})
            return Finding((*path, name), f"missing key {name!r}", str(rule.get("description", "")))
        case "type" | "enum" | "const":
            text = expected({error.validator: wanted})
            if "x-expected" in schema:
                text = str(schema["x-expected"])
            near = suggest(value, _choices(schema)) if isinstance(value, str) else ""
            hint = near if near.startswith("did you mean") else _remedy(value, text)
            hint = schema.get("x-hints", {}).get(value, hint) if isinstance(value, str) else hint
            return Finding(path, f"expected {text}, found {found}", hint, at_key)
        case "pattern" | "maxLength" | "minLength":
            rule = (
                schema.get("x-expected")
                or {
                    "pattern": f"text that matches {wanted}",
                    "maxLength": f"at most {wanted} characters",
                    "minLength": f"at least {wanted} characters",
                }[str(error.validator)]
            )
            return Finding(path, f"expected {rule}, found {found}", at_key=at_key)
        case "minItems" | "minProperties":
            return Finding(path, f"expected at least {wanted} entries, found {len(value)}")
        case "maxItems" | "maxProperties":
            return Finding(path, f"expected at most {wanted} entries, found {len(value)}")
        case "uniqueItems":
            return Finding(path, "expected every entry once")
    if error.validator in _BOUNDS:
        return Finding(path, f"expected {_BOUNDS[str(error.validator)]} {wanted}, found {found}")
    return Finding(path, error.message)


def _path(error: ValidationError) -> Path:
    path = tuple(error.absolute_path)
    return (*path, str(error.instance)) if "propertyNames" in error.absolute_schema_path else path


def _wrong_kind(error: ValidationError) -> bool:
    """Whether a branch of an alternative was plainly not meant: another type or another fixed value."""
    return error.validator in ("type", "enum", "const", "x-plugin") and not error.path and not error.cause


def _choices(schema: Any) -> list[str]:
    """The fixed texts a schema accepts."""
    if not isinstance(schema, Mapping):
        return []
    fixed = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        fixed += _choices(branch)
    return [item for item in fixed if isinstance(item, str)]


def _remedy(value: Any, wanted: str) -> str:
    if isinstance(value, str):
        if "true or false" in wanted and value.lower() in ("yes", "no", "on", "off"):
            return "write true or false: yes, no, on and off are plain text here"
        if "number" in wanted:
            return _number_remedy(value)
    return ""


def _number_remedy(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return ""
    return "write it without quotes and underscores"


def _additional_properties(
    validator: Any, rule: Any, value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """As in JSON Schema, with one error per unknown key; where a plug-in governs the rest, its schema decides."""
    if not isinstance(value, dict) or "x-plugin" in schema:
        return
    known = schema.get("properties", {})
    for key in value:
        if key in known:
            continue
        if rule is False:
            yield _unknown_key(key, known)
        elif rule is not True:
            yield from validator.descend(value[key], rule, path=key)


def _unknown_key(key: str, known: Iterable[str]) -> ValidationError:
    hint = suggest(key, known, "keys here") or "no keys are known here"
    return ValidationError(f"unknown key {key!r}", validator="unknown-key", path=[key], cause=_Hint(hint))


def _without_defaults(schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = {
        name: {key: item for key, item in rule.items() if key != "default"}
        for name, rule in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties}


def _number(types: Any, value: Any) -> Any:
    """`1` is 1.0 where a number is wanted, `1e3` is 1000 where a whole number is, so that both spell one cache key."""
    types = {types} if isinstance(types, str) else set(types or ())
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and "number" in types and "integer" not in types:
        return float(value)
    if isinstance(value, float) and "integer" in types and "number" not in types and value.is_integer():
        return int(value)
    return value
