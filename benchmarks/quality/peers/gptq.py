"""GPTQ (`llm-compressor`): columns rounded one after another, each error fed into those that follow.

Defaults are the library's own: damping of 0.01, columns in the order of their inputs' energy ("static": the groups stay
where they are, so nothing more is stored), each decoder layer calibrated on what the quantized ones before it answer.
llm-compressor pins another transformers than its peers here, so it has an environment of its own beside theirs.
"""

from __future__ import annotations

import importlib.util
import os
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
    "dampening_frac": 0.01,
    "actorder": "static",
    "observer": None,
    "observer_kwargs": {},
    "batch_size": 8,
}


def quantize(model: torch.nn.Module, job: Job) -> Quantized:
    """Calibrate, quantize and dequantize."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    options = job.options
    linears = quantized_linears(model)
    bits = layer_bits(options["bits"], list(linears))
    group_size = options["group_size"]
    stored = sum(group_bits(module.weight.shape, bits[name], group_size) for name, module in linears.items())
    groups = {}
    for count in sorted(set(bits.values())):
        weights = {"num_bits": count, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
        if options["observer"]:
            weights |= {"observer": options["observer"], "observer_kwargs": options["observer_kwargs"]}
        groups[f"bits_{count}"] = {"targets": [name for name in bits if bits[name] == count], "weights": weights}
    ones = [1] * job.calibration.shape[1]
    quantized = oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": ones} for ids in job.calibration.tolist()]),
        recipe=GPTQModifier(
            config_groups=groups,
            ignore=["lm_head"],
            dampening_frac=options["dampening_frac"],
            actorder=options["actorder"],
        ),
        num_calibration_samples=len(job.calibration),
        max_seq_length=job.calibration.shape[1],
        batch_size=options["batch_size"],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    weights, exact = {}, {}
    for name, module in quantized_linears(quantized).items():
        args = module.quantization_scheme.weights
        if (args.num_bits, args.group_size) != (bits[name], group_size):
            raise RuntimeError(f"{name} got {args.num_bits} bits, groups of {args.group_size}")
        zero = module.weight_zero_point.float() + 2 ** (bits[name] - 1)  # the library's indices are signed
        exact[f"{name}.weight"] = weight = module.weight.detach()
        weights[f"{name}.weight"] = on_grid(weight, module.weight_scale.detach(), zero, bits[name], group_size)
    return Quantized(weights, stored, quantized, exact)


def own_environment() -> None:
    """Go on with the Python that has llm-compressor, where this one hasn't."""
    if importlib.util.find_spec("llmcompressor") is None:
        python = Path(f"{sys.prefix}-gptq", "bin", "python")
        if not python.is_file():
            sys.exit(f"error: llm-compressor is neither installed here nor in {python.parent.parent}; run setup.sh")
        os.execv(python, [str(python), __file__, *sys.argv[1:]])


if __name__ == "__main__":
    own_environment()
    main(quantize, DEFAULTS, ("llmcompressor", "compressed-tensors"))
