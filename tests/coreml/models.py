"""Tiny decoders in every form that a package can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1q.coreml.architecture import Architecture, read_architecture
from a1q.coreml.layouts import Options
from a1q.coreml.package import write_package
from a1q.coreml.reader import Package, read_package
from a1q.coreml.single import build_program, outputs
from a1q.coreml.weights import DecoderWeights, decoder_weights
from tests.tiny import tiny_model

SCHEMES: dict[str, Mapping[str, Any] | None] = {
    "dense": None,
    "tensor-2": {"scheme": "lut", "bits": 2},
    "tensor-1": {"scheme": "lut", "bits": 1},
    "tensor-6": {"scheme": "lut", "bits": 6},
    "tensor-8": {"scheme": "lut", "bits": 8},
    "group-4": {"scheme": "lut", "bits": 4, "granularity": "group", "channels": 16},
    "channel-3": {"scheme": "lut", "bits": 3, "granularity": "channel"},
    "rank-1": {"scheme": "lut_lowrank", "bits": 4, "rank": 1, "fit": "absmax_svd"},
    "pairs": {"scheme": "vector_lut", "bits": 2},
    "fours": {"scheme": "vector_lut", "bits": 1.5, "vector": 4, "rank": 2, "fit": "kmeans"},
    "rank-3": {"scheme": "lut_lowrank", "bits": 2, "rank": 3, "fit": "absmax_svd"},
    "factors": {"scheme": "lut_lowrank", "bits": 2, "rank": 3, "fit": "absmax_svd", "factor_bits": 4},
}

UNTIED = ("dense", "channel-3", "rank-1", "pairs", "rank-3", "factors")
FORMS = [(name, True) for name in SCHEMES] + [(name, False) for name in UNTIED]
"""Scheme and whether the head is tied."""


@dataclass(frozen=True)
class Calls:
    """How a package of layout `single` is called."""

    chunk: int
    """Positions that `prefill` takes."""
    outputs: list[str]
    """Names of the logits in order."""


def decoder(scheme: Mapping[str, Any] | None = None, adapter: int = 0, **changes: Any) -> Any:
    """A tiny Qwen3 with fp16 numbers; with a scheme, all projections (and an untied head) quantized and snapped."""
    import torch
    from torch import nn

    from a1q.quant.linear import QuantLinear, swap_module

    model = tiny_model(**{"head_dim": 32, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
            parameter.copy_(parameter.half().float())
    if scheme is None:
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not (name == "lm_head" and model.config.tie_word_embeddings):
            quantized = QuantLinear.quantize(module, scheme, keep_latent=False)
            if adapter:
                down, up = torch.randn(adapter, module.in_features), torch.randn(module.out_features, adapter)
                quantized.set_adapter(0.1 * down, 0.1 * up, alpha=2.0 * adapter)
            quantized.snap()
            swap_module(model, name, quantized)
    return model


def program_of(
    model: Any, context: int = 128, chunk: int = 32, weights: DecoderWeights | None = None, **options: Any
) -> tuple[Any, Calls, Architecture]:
    """The MIL program of a model in the layout `single`, of other weights if given."""
    architecture = read_architecture(model.config.to_dict())
    weights = weights or decoder_weights(model)
    settings = Options(context, chunk, **options)
    calls = Calls(chunk, outputs(architecture, weights, settings))
    return build_program(architecture, weights, settings), calls, architecture


def saved(program: Any, folder: Path) -> Package:
    """Write a program as a package and read it back."""
    path = folder / "model.mlpackage"
    write_package(program, path)
    return read_package(path)


def package_of(
    model: Any, folder: Path, weights: DecoderWeights | None = None, **options: Any
) -> tuple[Package, Calls]:
    """Write a model as a package and read it back."""
    program, calls, _ = program_of(model, weights=weights, **options)
    return saved(program, folder), calls
