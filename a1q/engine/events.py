"""What happens during a run, told to whoever listens: the run folder, the terminal, a program.

An event is one JSON object: `{"time": seconds since 1970, "event": KIND, ...}`. Kinds and their fields:

| event       | fields                                                                              |
|-------------|-------------------------------------------------------------------------------------|
| run_start   | name, run (folder), stages: [{id, stage}], smoke                                    |
| stage_start | id, stage, key                                                                      |
| stage_run   | id, because (dotted key parts that changed since the last run in this folder): a miss |
| progress    | id, step, total, and the stage's figures                                            |
| log         | id, message                                                                         |
| stage_end   | id, stage, seconds, computed_seconds, cache (`hit` or `miss`), metrics, key, digest,  |
|             | kind, artifact (folder), failed_gates                                               |
| run_end     | status (`done`, `failed`, `gate failed`, `interrupted`), error, seconds             |

`a1q run --json` prints these and, after a user's error, a last line: `{"event": "error", "exit_code", "error",
"problems"}`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Listener = Callable[[Mapping[str, Any]], None]


class Events:
    """Tells every listener of every event, in order."""

    def __init__(self, listeners: Sequence[Listener] = ()):
        self.listeners = list(listeners)

    def __call__(self, kind: str, /, **values: Any) -> None:
        """Send one event; figures that are no numbers (NaN, infinity) are sent as null, which JSON can hold."""
        event = {"time": round(time.time(), 3), "event": kind, **_finite(plain(values))}
        for listener in self.listeners:
            listener(event)


def plain(value: Any) -> Any:
    """The same value as plain JSON types: mappings to dicts, tuples to lists, array scalars to numbers.

    Raises:
        TypeError: if JSON has no such value.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"{value!r} is no JSON value")


def not_finite(value: Any, path: str = "") -> list[str]:
    """Dotted paths of the numbers in `value` that are NaN or infinite."""
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in not_finite(item, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [text for index, item in enumerate(value) for text in not_finite(item, f"{path}.{index}")]
    return [path] if isinstance(value, float) and not math.isfinite(value) else []


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
