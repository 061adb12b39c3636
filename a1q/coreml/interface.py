"""Is a saved program called as `meta.json` says? Functions, positions, cache and logits, from its types alone.

An app and the runner take these from meta.json; what is wrong there shows on a device only when the cache is full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from a1q.coreml.metafile import META

if TYPE_CHECKING:
    from a1q.coreml.spec import Function

POSITIONS = {"model": "input_ids", "ffn": "position_ids"}
"""Role -> the input of which there is one number per position, on its last axis."""
WITH_LOGITS = ("model", "lm_head")
"""Roles of the parts whose outputs are the logits."""


def interface_problems(spec: Any, part: Mapping[str, Any], meta: Mapping[str, Any]) -> list[str]:
    """What the program of one part says otherwise than meta.json; empty for nothing.

    Args:
        spec: the model message (`Model_pb2.Model`) of its package.
    """
    from a1q.coreml.spec import read_functions

    functions, found = read_functions(spec), []
    for name, positions in part["functions"].items():
        if name not in functions:
            found.append(f"has no function {name}, which {META} names")
            continue
        if part["role"] in POSITIONS:
            found += _position_problems(functions[name], positions, POSITIONS[part["role"]])
            found += _state_problems(functions[name], meta)
        if part["role"] in WITH_LOGITS:
            found += _output_problems(functions[name], meta)
    return list(dict.fromkeys(found))


def _position_problems(function: Function, positions: int, name: str) -> list[str]:
    given = function.inputs.get(name)
    if given is None:
        return [f"has no input {name} in {function.name}"]
    if given.shape[-1:] != (positions,):
        return [f"takes {given.shape[-1] if given.shape else 0} positions in {function.name}, {META} says {positions}"]
    return []


def _state_problems(function: Function, meta: Mapping[str, Any]) -> list[str]:
    cache = function.states.get(meta["state"])
    if cache is None:
        return [f"has no state {meta['state']}, which {META} names"]
    if cache.shape[2:3] != (meta["context"],):
        return [f"has a cache of shape {list(cache.shape)}, {META} says {meta['context']} positions"]
    return []


def _output_problems(function: Function, meta: Mapping[str, Any]) -> list[str]:
    lacking = [name for name in meta["outputs"] if name not in function.outputs]
    if lacking:
        return [f"has no output {', '.join(lacking)}, which {META} names"]
    logits = sum((function.values[name].shape or (0,))[-1] or 0 for name in meta["outputs"])
    if logits != meta["vocabulary"]:
        return [f"gives {logits} logits, {META} says {meta['vocabulary']}"]
    return []
