"""AutoRound (Intel's `auto-round`): rounding and clipping learned block by block with signed gradient descent.

Defaults are the library's own for `iters` (its light recipe is 200, its best 1000): learning rate, batch of 8, block
inputs of the quantized model, best step kept. What differs: float32 without autocast, since the model is float32, and
the calibration tokens are ours, all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository, and not this folder, whose names would hide packages.
sys.path[0] = str(Path(__file__).resolve().parents[3])
# ruff: noqa: E402

import torch

from benchmarks.quality.peers.common import Job, Quantized, group_bits, layer_bits, main, on_grid, quantized_linears

DEFAULTS = {
    "bits": 2,
    "group_size": 64,
    "iters": 200,
    "batch_size": 8,
    "lr": None,
    "enable_alg_ext": False,
    "compile": False,
}


def quantize(model: torch.nn.Module, job: Job) -> Quantized:
    """Tune and dequantize."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    options = job.options
    linears = quantized_linears(model)
    bits = layer_bits(options["bits"], list(linears))
    group_size = options["group_size"]
    stored = sum(group_bits(module.weight.shape, bits[name], group_size) for name, module in linears.items())
    widest = max(bits.values())
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in job.calibration.split(options["batch_size"])
    ]
    library = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=widest,
        group_size=group_size,
        sym=False,
        layer_config={name: {"bits": count} for name, count in bits.items() if count != widest},
        dataset=batches,
        seqlen=job.calibration.shape[1],
        nsamples=len(job.calibration),
        batch_size=options["batch_size"],
        iters=options["iters"],
        lr=options["lr"],
        enable_alg_ext=options["enable_alg_ext"],
        enable_torch_compile=options["compile"],
        amp=False,
        device_map="cpu",
        seed=job.seed,
    )
    quantized, _ = library.quantize()
    weights, exact = {}, {}
    for name, module in quantized_linears(quantized).items():
        if module.bits != bits[name] or module.group_size != group_size:
            raise RuntimeError(f"{name} got {module.bits} bits, groups of {module.group_size}")
        exact[f"{name}.weight"] = weight = module.weight.detach()
        weights[f"{name}.weight"] = on_grid(weight, module.scale, module.zp, bits[name], group_size)
    return Quantized(weights, stored, quantized, exact)


if __name__ == "__main__":
    main(quantize, DEFAULTS, ("auto-round",))
