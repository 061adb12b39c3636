"""`meta.json` of an exported folder: how its packages are called. Reading it imports nothing.

| key | value |
|---|---|
| `format` | 2 |
| `layout` | `single` or `anemll` |
| `model_type`, `vocabulary`, `eos_token_id` | of the model |
| `context`, `prefill` | positions that the cache holds, and that prefill takes at once |
| `state`, `outputs` | names of the state, and of the logits in order |
| `parts` | list of {name, file, role, functions: {name: positions}, layers: [first, end], theory_bytes} |
| `schemes`, `residual_scale`, `adapters` | schemes by module, factor of the residual stream, names of adapters |
| `repalettized` | rules by which modules were fitted anew for the package |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from a1q.errors import MismatchError, Problem

FORMAT = 2
META = "meta.json"
ROLES = {"single": ["model"], "anemll": ["embeddings", "ffn", "lm_head"]}
"""Layout -> the roles that its parts have."""


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta.json` of an exported folder.

    Raises:
        MismatchError: if it is missing, damaged, or of a format or layout that this a1q does not know.
    """
    file = folder / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "take the whole folder that `export: {format: coreml}` wrote"
        message = f"{folder} has no {META}, which says how a Core ML package is run"
        raise MismatchError([Problem(message, hint=hint)]) from None
    except (OSError, ValueError) as error:
        raise MismatchError(f"{file} can't be read: {error}") from None
    if not isinstance(meta, dict):
        raise MismatchError(f"{file} is damaged: it is no mapping")
    if meta.get("format") != FORMAT:
        hint = "export the model again with this a1q"
        raise MismatchError(
            [Problem(f"{file} has format {meta.get('format')!r}; this a1q reads format {FORMAT}", hint=hint)]
        )
    if meta.get("layout") not in [*ROLES]:
        raise MismatchError(f"{file} has the layout {meta.get('layout')!r}; this a1q knows {', '.join(ROLES)}")
    wrong = _wrong(meta, _ENTRIES, "")
    for index, part in enumerate(meta["parts"] if isinstance(meta.get("parts"), list) else []):
        wrong += _wrong(part if isinstance(part, dict) else {}, _PART_ENTRIES, f"parts[{index}].")
    if wrong:
        raise MismatchError(f"{file} is damaged: {', '.join(wrong)} is missing or of another type")
    if found := _part_list_problem(meta):
        raise MismatchError(f"{file} is damaged: {found}")
    return meta


def _wrong(entries: Mapping[str, Any], wanted: Mapping[str, Callable[[Any], bool]], prefix: str) -> list[str]:
    return [prefix + key for key, fits in wanted.items() if not fits(entries.get(key))]


def _part_list_problem(meta: Mapping[str, Any]) -> str:
    """What the list of parts has too many or too few of; empty if nothing."""
    roles = [part["role"] for part in meta["parts"]]
    wanted = ROLES[meta["layout"]]
    if sorted({*roles}) != sorted(wanted) or any(roles.count(role) > 1 for role in wanted if role != "ffn"):
        return f"the parts of layout {meta['layout']} are {', '.join(wanted)}, not {', '.join(roles)}"
    for key in ("name", "file"):
        if len({part[key] for part in meta["parts"]}) < len(roles):
            return f"two parts have the same {key}"
    for part in meta["parts"]:
        if part["role"] in ("model", "ffn") and not {"infer", "prefill"} <= {*part["functions"]}:
            return f"part {part['name']} lacks the functions infer and prefill"
        if part["functions"].get("prefill", meta["prefill"]) != meta["prefill"]:
            return f"prefill is {meta['prefill']}, but {part['functions']['prefill']} in part {part['name']}"
    return ""


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _file(value: Any) -> bool:
    """A name inside the folder."""
    return _text(value) and value != ".." and "\0" not in value and Path(value).name == value


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value)) and 0 < len(value) == len({*value})


def _functions(value: Any) -> bool:
    return isinstance(value, dict) and value != {} and all(map(_count, value.values()))


def _layers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(n == 0 or _count(n) for n in value)


def _rules(value: Any) -> bool:
    if value is None:
        return True
    mappings = isinstance(value, dict) and all(isinstance(rule, dict) for rule in value.values())
    return mappings and all(_text(rule.get("match")) and _text(rule.get("scheme")) for rule in value.values())


_ENTRIES = {
    "model_type": _text,
    "context": _count,
    "prefill": _count,
    "vocabulary": _count,
    "state": _text,
    "outputs": _names,
    "parts": lambda value: isinstance(value, list) and value != [],
    "repalettized": _rules,
}
_PART_ENTRIES = {
    "name": _text,
    "file": _file,
    "role": _text,
    "functions": _functions,
    "layers": _layers,
    "theory_bytes": lambda value: value is None or _count(value),
}
