"""Build a frozen, typed config from a validated, default-filled mapping.

Fields carry no defaults: those stand in the JSON Schema alone, and a test proves that a class's fields and its
schema's properties are the same set. A field typed with another dataclass takes a nested mapping; everything
else is passed through with lists frozen to tuples.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build_config(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return `cls(**values)`, with nested dataclasses built from nested mappings.

    Raises:
        TypeError: if the mapping's keys and the class's fields differ (a schema and its class disagree).
    """
    hints = typing.get_type_hints(cls)
    names = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(values) != names:
        odd = sorted(set(values) ^ names)
        raise TypeError(f"{cls.__name__} and its schema disagree about {', '.join(odd)}")
    return cls(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        nested = _dataclass_in(hint)
        if nested is not None:
            return build_config(nested, value)
        return types.MappingProxyType({key: _convert(Any, item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_convert(Any, item) for item in value)
    return value


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass named by `hint` or by a member of its union (`Objective | None`), if there is one."""
    for option in typing.get_args(hint) or (hint,):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None
