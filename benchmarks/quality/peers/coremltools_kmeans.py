"""coremltools' k-means palettization of a PyTorch model: one table of 2^bits values per tensor or group of channels.

Options as `ModulePostTrainingPalettizerConfig` has them: `granularity` per_tensor, or per_grouped_channel with
`group_size` channels along `channel_axis`; `enable_per_channel_scale` divides each row by its absmax first. The library
rounds weights to four decimals before it clusters them, its "fast" mode; here that is off, for the exact optimum.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository, and not this folder, whose names would hide packages.
sys.path[0] = str(Path(__file__).resolve().parents[3])
# ruff: noqa: E402

import torch

from benchmarks.quality.peers.common import (
    SCALE_BITS,
    Job,
    JobError,
    Quantized,
    layer_bits,
    main,
    quantized_linears,
    table_bits,
)

DEFAULTS = {
    "bits": 2,
    "granularity": "per_tensor",
    "group_size": None,
    "channel_axis": 0,
    "enable_per_channel_scale": False,
    "enable_fast_kmeans_mode": False,
}


def quantize(model: torch.nn.Module, job: Job) -> Quantized:
    """Cluster, and take the weights out with tables and scales in fp16."""
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    options = job.options
    linears = quantized_linears(model)
    bits = layer_bits(options["bits"], list(linears))
    shared = {name: options[name] for name in DEFAULTS if name != "bits"}
    config = PostTrainingPalettizerConfig.from_dict(
        {"module_name_configs": {name: {"n_bits": bits[name], **shared} for name in linears}}
    )
    palettized = PostTrainingPalettizer(model, config).compress()
    weights, exact, stored = {}, {}, 0
    for name, module in quantized_linears(palettized).items():
        exact[f"{name}.weight"] = weight = module.weight.detach()
        scale = torch.ones(len(weight), 1)
        if options["enable_per_channel_scale"]:
            scale = linears[name].weight.detach().abs().amax(dim=1, keepdim=True)
            stored += len(weight) * SCALE_BITS
        groups = split(weight / scale, options["granularity"], options["group_size"], options["channel_axis"])
        stored += weight.numel() * bits[name] + len(groups) * table_bits(bits[name])
        for group in groups:
            values = distinct(group)
            if len(values) > 2 ** bits[name]:
                raise RuntimeError(f"{name} has {len(values)} values in one group, more than {2 ** bits[name]}")
        weights[f"{name}.weight"] = (weight / scale).half().float() * scale.half().float()
    return Quantized(weights, stored, palettized, exact)


def split(weight: torch.Tensor, granularity: str, group_size: int | None, axis: int) -> tuple[torch.Tensor, ...]:
    """The parts of a weight that share a table.

    Raises:
        JobError: if the groups don't divide the channels; the library would leave such a weight alone.
    """
    if granularity == "per_tensor":
        return (weight,)
    if not group_size or weight.shape[axis] % group_size:
        raise JobError(f"groups of {group_size} don't divide {weight.shape[axis]} channels")
    return weight.split(group_size, dim=axis)


def distinct(group: torch.Tensor) -> torch.Tensor:
    """Sorted values, those equal but for the rounding of a division by the channel's scale taken as one."""
    values = group.unique()
    gap = 1e-5 * values.abs().max()
    return values[torch.cat([torch.tensor([True]), values.diff() > gap])]


if __name__ == "__main__":
    main(quantize, DEFAULTS, ("coremltools",))
