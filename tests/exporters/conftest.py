"""Small models in every state an exporter can meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from a1q.engine.artifact import Artifact
from a1q.engine.stage import StageContext
from tests.tiny import tiny_folder

SPECS = {
    "mlp": {"scheme": "lut_lowrank", "bits": 2, "rank": 1},
    "attn": {"scheme": "lut_lowrank", "bits": 4, "rank": 2},
}


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def quantized_model(dense_folder: Path) -> Any:
    """MLPs at 2 bits, attention at 4 bits, latents kept. Copy it before changing it."""
    from torch import nn

    from a1q.models.checkpoint import load_model
    from a1q.quant.linear import QuantLinear, swap_module

    model = load_model(dense_folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            spec = SPECS["mlp" if ".mlp." in name else "attn"]
            swap_module(model, name, QuantLinear.quantize(module, spec))
    return model


def save(model: Any, folder: Path, tokenizer_from: Path) -> Artifact:
    """Write the model as an artifact's folder."""
    from a1q.models.checkpoint import save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder, tokenizer_from=tokenizer_from)
    return Artifact("model", folder, "test")


def context(out: Path) -> StageContext:
    """A context whose files go to `out`."""
    out.mkdir(parents=True)
    scratch = out.parent / f"{out.name}-scratch"
    scratch.mkdir()
    return StageContext(id="export", config=None, seed=7, inputs={}, out=out, scratch=scratch)
