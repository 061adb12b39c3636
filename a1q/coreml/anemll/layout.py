"""What `a1q.coreml.layouts.Layout` asks of a layout. Light: no torch, no coremltools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.coreml.anemll.meta import config_json, meta_yaml
from a1q.coreml.anemll.names import STATE, default_splits
from a1q.coreml.anemll.parts import outputs, parts
from a1q.coreml.layouts import Options
from a1q.coreml.single import head_problems

__all__ = ["STATE", "companions", "outputs", "parts", "problems"]


def problems(config: Mapping[str, Any], options: Options, step: int) -> list[str]:
    """See `a1q.coreml.layouts.Layout`."""
    vocabulary, layers = int(config["vocab_size"]), int(config["num_hidden_layers"])
    splits = options.head_parts or default_splits(config["model_type"], vocabulary, step)
    found = head_problems(vocabulary, splits, step)
    if options.chunks is not None and options.chunks > layers:
        found.append(f"chunks is {options.chunks}, but there are {layers} layers to divide")
    return found


def companions(folder: Path, meta: Mapping[str, Any], options: Options) -> None:
    """Write `meta.yaml` and `config.json`."""
    (folder / "meta.yaml").write_text(meta_yaml(meta), encoding="utf-8")
    (folder / "config.json").write_text(config_json(meta, folder), encoding="utf-8")
