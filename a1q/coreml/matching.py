"""Is this folder the model that a package was made of? Asked before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.coreml.architecture import problems, read_architecture
from a1q.coreml.bundle import TOKENIZER, Bundle
from a1q.errors import MismatchError, Problem, StageError

FINAL_NORM = "model_norm"
"""Name of the constant that holds the last norm's gains, twice: RMSNorm is a LayerNorm over (x, -x)."""


def require_match(bundle: Bundle, folder: Path) -> None:
    """Refuse a model folder of another family, of other sizes, or with another tokenizer.

    Raises:
        MismatchError: naming every difference.
    """
    from a1q.models.view import read_view

    try:
        config = read_view(folder).config
    except StageError as error:
        raise MismatchError(str(error)) from None
    found = _differences(bundle, config) or _tokenizers_differ(bundle.folder, folder)
    if found:
        hint = f"give the model that {bundle.folder} was exported from: a run folder, RUN:STAGE_ID or a model folder"
        raise MismatchError([*(Problem(text) for text in found[:-1]), Problem(found[-1], hint=hint)])


def _differences(bundle: Bundle, config: Mapping[str, Any]) -> list[str]:
    """What the config says otherwise than the package."""
    meta = bundle.meta
    if config.get("model_type") != meta["model_type"]:
        return [f"the package holds a {meta['model_type']} model, the folder a {config.get('model_type')} model"]
    unsupported = problems(config)
    if unsupported:
        return unsupported
    model, package = read_architecture(config), _sizes(bundle)
    return [
        f"the package has {name} {package[key]}, the model {getattr(model, key)}"
        for key, name in _NAMES.items()
        if key in package and package[key] != getattr(model, key)
    ]


_NAMES = {
    "vocabulary": "a vocabulary of", "layers": "layers:", "hidden": "hidden size", "kv_heads": "key/value heads:",
    "head_dim": "head_dim",
}  # fmt: skip
"""Attribute of `Architecture` -> how it is called in a message."""


def _sizes(bundle: Bundle) -> dict[str, int]:
    """The model's sizes as the packages have them, by attribute of `Architecture`."""
    from a1q.coreml.spec import read_functions
    from a1q.coreml.weightfile import read_spec

    sizes = {"vocabulary": bundle.vocabulary, "layers": max(part["layers"][1] for part in bundle.meta["parts"])}
    for part in bundle.meta["parts"]:
        for function in read_functions(read_spec(bundle.folder / part["file"])).values():
            for state in function.states.values():
                slots, sizes["kv_heads"], _, sizes["head_dim"] = (size or 0 for size in state.shape)
                sizes["layers"] = slots // 2
            if FINAL_NORM in function.values:
                # Widths are even: one more pair is the floor of a stream that is scaled very small.
                sizes["hidden"] = function.values[FINAL_NORM].elements // 4 * 2
    return sizes


def _tokenizers_differ(package: Path, model: Path) -> list[str]:
    """Whether the two folders' tokenizers cut text differently; their settings for batches may differ."""
    files = [package / TOKENIZER, model / TOKENIZER]
    present = [file for file in files if file.is_file()]
    if len(present) < 2:
        lacking = [file for file in files if file not in present]
        return [f"{present[0]} has no counterpart: there is no {lacking[0]}"] if present else []
    if files[0].read_bytes() == files[1].read_bytes():
        return []
    contents = [_read_mapping(file) for file in files]
    for content in contents:
        for setting in ("version", "truncation", "padding"):
            content.pop(setting, None)
    other = sorted(key for key in {*contents[0], *contents[1]} if contents[0].get(key) != contents[1].get(key))
    return [f"{files[0]} and {files[1]} are different tokenizers: they differ in {', '.join(other)}"] if other else []


def _read_mapping(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        MismatchError: if it does not.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MismatchError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise MismatchError(f"{file} is damaged: it is no mapping")
    return content
