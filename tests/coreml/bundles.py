"""Exported folders built in code, without the export stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from a1q.coreml.architecture import read_architecture
from a1q.coreml.bundle import Bundle, read_bundle
from a1q.coreml.layouts import Options, get_layout
from a1q.coreml.package import write_package
from a1q.coreml.weights import DecoderWeights, decoder_weights
from a1q.models.checkpoint import save_model
from tests.tiny import write_tokenizer

CONTEXT, PREFILL = 128, 32


def bundle_of(
    model: Any, folder: Path, layout: str = "single", weights: DecoderWeights | None = None, **options: Any
) -> Bundle:
    """Write a model, or other weights in its shape, as an exported folder: context 128, prefill 32."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    architecture, weights = read_architecture(config), weights or decoder_weights(model)
    settings = Options(CONTEXT, PREFILL, **options)
    module = get_layout(layout)
    parts = module.parts(architecture, weights, settings)
    for part in parts:
        write_package(part.build(lambda: None), folder / part.file)
    meta = {
        "format": 2, "layout": layout, "model_type": config["model_type"], "context": CONTEXT, "prefill": PREFILL,
        "vocabulary": architecture.vocabulary, "eos_token_id": config["eos_token_id"], "state": module.STATE,
        "outputs": module.outputs(architecture, weights, settings), "parts": [part.facts() for part in parts],
        "schemes": {}, "residual_scale": settings.residual_scale, "adapters": [],
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    write_tokenizer(folder, architecture.vocabulary)
    return read_bundle(folder)


def model_folder(model: Any, folder: Path) -> Path:
    """Save a model with the tokenizer that `bundle_of` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder)
    write_tokenizer(folder, model.config.vocab_size)
    return folder
