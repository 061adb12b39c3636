"""Exported folders built in code, without the export stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from a1q.coreml.bundle import Bundle, read_bundle
from tests.coreml.models import package_of
from tests.tiny import write_tokenizer


def write_meta(folder: Path, config: Any, outputs: list[str], base: bool = False) -> None:
    """meta.json of a package in the layout `single`, context 128, prefill 32."""
    functions = {"infer": 1, "prefill": 32} | ({"infer_base": 1, "prefill_base": 32} if base else {})
    part = {
        "name": "model", "file": "model.mlpackage", "role": "model", "functions": functions,
        "layers": [0, config.num_hidden_layers], "theory_bytes": 1,
    }  # fmt: skip
    meta = {
        "format": 2, "layout": "single", "model_type": config.model_type, "context": 128, "prefill": 32,
        "vocabulary": config.vocab_size, "eos_token_id": config.eos_token_id, "state": "kv_cache",
        "outputs": outputs, "parts": [part], "schemes": {}, "residual_scale": 1.0, "adapters": [],
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def bundle_of(model: Any, folder: Path, **options: Any) -> Bundle:
    """Write a model as an exported folder in the layout `single`: context 128, prefill 32."""
    folder.mkdir(parents=True, exist_ok=True)
    _, calls = package_of(model, folder, **options)
    write_meta(folder, model.config, calls.outputs, base=options.get("adapter_functions", False))
    write_tokenizer(folder, model.config.vocab_size)
    return read_bundle(folder)
