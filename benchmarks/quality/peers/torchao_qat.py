"""Quantization-aware training with torchao's integer fake quantization, distilled by the loop that every method shares.

torchao's `IntxFakeQuantizeConfig` (0.18) is not what runs here: for an asymmetric group it computes tinygemm's floating
zero point, in units of the weights, and uses it as an index, so that part of a group's range is cut off. torchao's
`AffineFakeQuantize` with its moving min-max observer, which forgets everything at a constant of 1, has the integer
zero point. It sits in the same `FakeQuantizedLinear`. Range and zero point follow the weights at every step; the
weights of the quantized linears are what is trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository, and not this folder, whose names would hide packages.
sys.path[0] = str(Path(__file__).resolve().parents[3])
# ruff: noqa: E402

import torch

from benchmarks.quality.loop import distill
from benchmarks.quality.peers.common import (
    Job,
    Quantized,
    group_bits,
    layer_bits,
    load_model,
    main,
    on_grid,
    quantized_linears,
)

DEFAULTS = {"bits": 2, "group_size": 64, "lr": 1e-3, "steps": 200, "batch": 16, "warmup": 5, "final_lr": 0.01}


def quantize(model: torch.nn.Module, job: Job) -> Quantized:
    """Put fake quantization in, train, and take the weights out as they are quantized."""
    options = job.options
    linears = quantized_linears(model)
    bits = layer_bits(options["bits"], list(linears))
    group_size = options["group_size"]
    stored = sum(group_bits(module.weight.shape, bits[name], group_size) for name, module in linears.items())
    for name, module in linears.items():
        model.set_submodule(name, fake_quantized(module, bits[name], group_size))
    linears = quantized_linears(model)
    steps = options["steps"]
    history = {"losses": []}
    if steps:
        history = distill(
            model,
            load_model(job.model),
            job.training[: steps * options["batch"]],
            [{"params": [module.weight for module in linears.values()], "lr": options["lr"]}],
            steps=steps,
            batch=options["batch"],
            warmup=options["warmup"],
            final_lr=options["final_lr"],
            seed=job.seed,
        )
    weights, exact = {}, {}
    with torch.no_grad():
        for name, module in linears.items():
            quantizer = module.weight_fake_quantizer
            exact[f"{name}.weight"] = weight = quantizer(module.weight)
            scale, zero = (part.reshape(len(weight), -1) for part in (quantizer.scale, quantizer.zero_point))
            weights[f"{name}.weight"] = on_grid(weight, scale, zero, bits[name], group_size)
    return Quantized(weights, stored, model, exact, {"losses": history["losses"]})


def fake_quantized(module: torch.nn.Linear, bits: int, group_size: int) -> torch.nn.Linear:
    """torchao's linear, with the same weight parameter, that quantizes it at every use."""
    from torchao.quantization import PerGroup
    from torchao.quantization.pt2e._affine_quantization import AffineQuantizedMovingAverageMinMaxObserver
    from torchao.quantization.pt2e.fake_quantize import AffineFakeQuantize
    from torchao.quantization.qat.linear import FakeQuantizedLinear
    from torchao.quantization.quant_primitives import MappingType

    found = FakeQuantizedLinear.from_linear(module)
    found.weight_fake_quantizer = AffineFakeQuantize(
        observer=AffineQuantizedMovingAverageMinMaxObserver,
        averaging_constant=1,
        mapping_type=MappingType.ASYMMETRIC,
        target_dtype=torch.uint8,
        quant_min=0,
        quant_max=2**bits - 1,
        granularity=PerGroup(group_size),
        eps=1e-6,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    return found


if __name__ == "__main__":
    main(quantize, DEFAULTS, ("torchao",))
