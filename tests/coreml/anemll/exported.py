"""Exported folders of this layout, built in code without the export stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from a1q.coreml.anemll import layout
from a1q.coreml.architecture import read_architecture
from a1q.coreml.bundle import Bundle, read_bundle
from a1q.coreml.layouts import Options
from a1q.coreml.package import write_package
from a1q.coreml.weights import decoder_weights
from tests.tiny import tiny_family, write_tokenizer


def family(model_type: str, **changes: Any) -> Any:
    """A tiny decoder whose numbers are those that fp16 has."""
    import torch

    model = tiny_family(model_type, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def options(**changes: Any) -> Options:
    """Context 128, prefill 32, two chunks."""
    return Options(**{"context": 128, "prefill": 32, "chunks": 2, "name": "tiny", **changes})


def exported(model: Any, folder: Path, **changes: Any) -> Bundle:
    """Write a model as an exported folder and read it back."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = options(**changes)
    architecture, weights = read_architecture(model.config.to_dict()), decoder_weights(model)
    parts = layout.parts(architecture, weights, chosen)
    for part in parts:
        write_package(part.build(lambda: None), folder / part.file)
    meta = {
        "format": 2, "layout": "anemll", "name": chosen.name, "model_type": architecture.model_type,
        "context": chosen.context, "prefill": chosen.prefill, "vocabulary": architecture.vocabulary,
        "eos_token_id": model.config.eos_token_id, "state": layout.STATE,
        "outputs": layout.outputs(architecture, weights, chosen), "parts": [part.facts() for part in parts],
        "schemes": {}, "residual_scale": chosen.residual_scale,
        "adapters": ["base"] if chosen.adapter_functions else [],
    }  # fmt: skip
    write_tokenizer(folder, architecture.vocabulary)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    layout.companions(folder, meta, chosen)
    return read_bundle(folder)
