"""Make a scheme from its mapping, the one that stands in recipes and in artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a1q.engine.config import build_config
from a1q.engine.registry import active_registry
from a1q.errors import StageError
from a1q.quant.scheme import Scheme


def complete(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`mapping` with the schema's defaults for what it leaves out; `scheme` comes first.

    Raises:
        StageError: if no scheme has that name, options are unknown or missing, or a value is none of those listed.
    """
    registry = active_registry()
    name = str(mapping.get("scheme"))
    try:
        properties = registry.schema("schemes", name)["properties"]
    except KeyError:
        near = registry.nearest("schemes", name)
        raise StageError(f"unknown scheme {name!r}" + (f"; did you mean {near!r}?" if near else "")) from None
    defaults = {key: item["default"] for key, item in properties.items() if "default" in item}
    filled = {"scheme": name, **defaults, **mapping}
    known = set(properties) | {"scheme"}
    for problem, names in (("unknown", set(filled) - known), ("missing", known - set(filled))):
        if names:
            raise StageError(f"scheme {name!r}: {problem} option {', '.join(sorted(names))}")
    for key, value in filled.items():
        listed = properties.get(key, {}).get("enum")
        if listed is None:
            continue
        if value not in listed or isinstance(value, bool):
            raise StageError(f"scheme {name!r}: `{key}: {value}` is none of {', '.join(map(str, listed))}")
        filled[key] = listed[listed.index(value)]  # 2.0 is 2, also in cache keys
    return filled


def make_scheme(mapping: Mapping[str, Any]) -> Scheme:
    """The scheme that `mapping` (`{"scheme": "lut_lowrank", "bits": 4, ...}`) describes. No torch is imported.

    Raises:
        StageError: as `complete`.
    """
    filled = complete(mapping)
    cls = active_registry().get("schemes", filled.pop("scheme"))
    return cls(build_config(cls.Config, filled))
