"""LoRA adapters that PEFT wrote, found in a folder and described without torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1q.engine.artifact import Artifact
from a1q.engine.digests import content_digest
from a1q.errors import MismatchError, Problem
from a1q.models.view import read_safetensors_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B)\.weight")
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}
"""What an adapter has to be, where its config says it."""


@dataclass(frozen=True)
class AdapterView:
    """One module's adapter: scale · B A [out, in], of A [rank, in] and B [out, rank]."""

    rank: int
    shape: tuple[int, int]
    scale: float


def resolve_adapter(source: str) -> Artifact:
    """The adapter in a folder, and its content digest.

    Raises:
        MismatchError: if there is none, or only one in pickles.
    """
    folder = Path(source).expanduser()
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        hint = "a folder that PEFT's `save_pretrained` wrote, such as `adapter/` of a model kept by `merge: adapter`"
        raise MismatchError([Problem(f"{source} has no {' and no '.join(missing)}", hint=hint)])
    folder = folder.resolve()

    def digest() -> str:
        return content_digest(folder, (CONFIG, WEIGHTS))

    return Artifact("adapter", folder, digest(), {"source": source}, digest)


def read_adapter_view(folder: Path) -> dict[str, AdapterView]:
    """Name of the adapted linear -> its adapter, from config and header.

    Raises:
        MismatchError: if it is not plain LoRA on linears.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        header = read_safetensors_header(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise MismatchError(f"{folder} is no whole adapter: {error}") from None
    if not isinstance(config, dict):
        raise MismatchError(f"{folder / CONFIG} holds no JSON object")
    odd = [
        f"{name}: {config[name]}" for name, plain in PLAIN.items() if config.get(name, plain) not in (plain, None, [])
    ]
    if odd:
        raise MismatchError(f"{folder} is no plain LoRA, which is all that is read: {', '.join(odd)}")
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        found = TENSOR.fullmatch(name)
        if found is None:
            raise MismatchError(f"{folder}: {name} is no part of a LoRA adapter of a linear")
        shapes.setdefault(found["module"], {})[found["part"]] = tuple(item["shape"])
    views = {}
    for name, parts in shapes.items():
        a, b = parts.get("lora_A", ()), parts.get("lora_B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise MismatchError(f"{folder}: {name} has A {list(a)} and B {list(b)}, which don't multiply")
        try:
            scale = _scale(config, name, a[0])
        except (KeyError, TypeError, ValueError, re.error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise MismatchError(f"{folder / CONFIG} doesn't say the alpha of {name} ({reason})") from None
        views[name] = AdapterView(a[0], (b[0], a[1]), scale)
    return views


def read_adapter(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> A [rank, in] and scale · B [out, rank], fp32 tensors. Raises as `read_adapter_view`."""
    from safetensors.torch import load_file

    views, tensors = read_adapter_view(folder), load_file(folder / WEIGHTS)
    found = {}
    for name, view in views.items():
        a, b = (tensors[f"base_model.model.{name}.{part}.weight"].float() for part in ("lora_A", "lora_B"))
        found[name] = a, view.scale * b
    return found


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, as PEFT finds the alpha of a module: by the first pattern that is the end of its name."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise TypeError("alpha_pattern is no object")
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
    alpha = float(config["lora_alpha"] if key is None else patterns[key])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
