"""One self-contained JSON Schema for a whole recipe, for editors: the root, every stage, scheme and exporter.

What our own checker does by `x-plugin` is said here with `if`/`then`, so that any JSON Schema tool understands it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a1q.engine.registry import FAMILIES, Registry
from a1q.recipe.schema import PLUGIN_KEYS
from a1q.recipe.validate import recipe_schema


def composed_schema(registry: Registry) -> dict[str, Any]:
    """The schema of a recipe with everything `registry` knows; plain JSON Schema 2020-12."""
    schema = recipe_schema()
    for family in FAMILIES:
        schema["$defs"][family] = {
            name: _rewritten(registry, registry.schema(family, name), f"#/$defs/{family}/{name}")
            for name in registry.names(family)
        }
    stage = schema["properties"]["stages"]["items"]
    stage["additionalProperties"] = False
    stage["oneOf"] = [{"required": [name]} for name in registry.names("stages")]
    for name in registry.names("stages"):
        definition = schema["$defs"]["stages"][name]
        definition["properties"].setdefault("from", stage["properties"]["from"])
        reference: dict[str, Any] = {"$ref": f"#/$defs/stages/{name}"}
        stage["properties"][name] = {
            "description": definition.get("description", ""),
            **(reference if definition.get("required") else {"anyOf": [reference, {"type": "null"}]}),
        }
    return schema


def _rewritten(registry: Registry, node: Any, base: str) -> Any:
    """A plug-in's schema moved to `base`: local references point there, and `x-plugin` becomes `if`/`then`."""
    if isinstance(node, list):
        return [_rewritten(registry, item, base) for item in node]
    if not isinstance(node, Mapping):
        return node
    out = {key: _rewritten(registry, item, base) for key, item in node.items() if not _ours(key)}
    if isinstance(node.get("$ref"), str) and node["$ref"].startswith("#/"):
        out["$ref"] = base + node["$ref"][1:]
    if isinstance(node.get("x-plugin"), str):
        out = _dispatched(registry, node, out)
    return out


def _ours(key: str) -> bool:
    return key in ("x-a1q", "x-plugin", "x-partial", "x-expected", "$schema")


def _dispatched(registry: Registry, node: Mapping[str, Any], out: dict[str, Any]) -> dict[str, Any]:
    """`out` with one `if`/`then` per plug-in of the family.

    A plug-in's schema forbids unknown keys, so each `then` names its options beside those of the mapping itself.
    """
    family, partial = node["x-plugin"], bool(node.get("x-partial"))
    key = PLUGIN_KEYS[family]
    names = registry.names(family)
    own = {**out.get("properties", {}), "from": True} if "x-a1q" in node else out.get("properties", {})
    properties = {name: registry.schema(family, name).get("properties", {}) for name in names}
    about = {"description": f"Name of the {family.removesuffix('s')}.", **own.get(key, {}), "enum": names}
    out = {**out, "type": "object", "properties": {**out.get("properties", {}), key: about}}
    out.pop("additionalProperties", None)
    if not partial:
        out["required"] = list(dict.fromkeys([*node.get("required", ()), key]))
    out["allOf"] = [
        {
            "if": {"properties": {key: {"const": name}}, "required": [key]},
            "then": {
                "properties": {
                    **{item: {"$ref": f"#/$defs/{family}/{name}/properties/{item}"} for item in properties[name]},
                    **dict.fromkeys([*own, key], True),
                },
                "required": [] if partial else list(registry.schema(family, name).get("required", ())),
                "additionalProperties": False,
            },
        }
        for name in names
    ]
    if partial:
        known = {item for options in properties.values() for item in options} | {key, *own}
        out["propertyNames"] = {"enum": sorted(known)}
    return out
