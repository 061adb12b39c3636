"""Look-up tables as grids: nearest entry, look-up, sums per entry.

All functions take tables `lut` [n, L] where table i serves row block i of a matrix [out, in], out divisible by n.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
"""Least |scale| in the division that assigns indices. The forward pass has no floor."""
FP16_MAX = 65504.0
FEW = 16
"""Up to this many entries a comparison per midpoint is faster than a binary search."""


def nearest(values: Tensor, lut: Tensor) -> Tensor:
    """Index uint8 [out, in] of the entry of `lut` [n, L] nearest to each of `values` [out, in].

    Entries need not ascend (training may move them past each other). A value midway takes the smaller entry.
    """
    ascending, order = lut.sort(dim=1)
    edges = (ascending[:, 1:] + ascending[:, :-1]) / 2
    blocks = values.reshape(len(lut), -1)
    if lut.shape[1] <= FEW:
        position = torch.zeros(blocks.shape, dtype=torch.uint8, device=values.device)
        for edge in edges.unbind(1):
            position += blocks > edge[:, None]
    elif len(lut) == 1:
        position = torch.bucketize(blocks, edges[0], out_int32=True).to(torch.uint8)
    else:
        position = torch.searchsorted(edges, blocks.contiguous(), out_int32=True).to(torch.uint8)
    if not torch.equal(ascending, lut):
        position = order.to(torch.uint8).gather(1, position.long())
    return position.reshape(values.shape)


def safe_scale(scale: Tensor) -> Tensor:
    """`scale` with |scale| at least `FLOOR` and its sign kept, for use as a divisor."""
    return scale.abs().clamp_min_(FLOOR).copysign_(scale)


def lookup(lut: Tensor, indices: Tensor) -> Tensor:
    """The entries [out, in] that uint8 `indices` [out, in] name."""
    return lut.reshape(-1).index_select(0, _flat(lut, indices)).reshape(indices.shape)


def sums_per_entry(indices: Tensor, values: Tensor, lut: Tensor) -> Tensor:
    """Sum of `values` [out, in] over the places that use each entry: [n, L], in the type of `values`."""
    flat, bins = _flat(lut, indices), lut.numel()
    if values.device.type == "cpu":
        return torch.bincount(flat, values.reshape(-1), bins).to(values.dtype).reshape(lut.shape)
    # bincount has no deterministic form on CUDA; index_add_ has one.
    return values.new_zeros(bins).index_add_(0, flat, values.reshape(-1)).reshape(lut.shape)


def round_fp16(tensor: Tensor) -> Tensor:
    """`tensor` rounded to what fp16 holds, in its own type; beyond ±65504 it saturates."""
    return tensor.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).to(tensor.dtype)


def to_fp16(tensor: Tensor) -> Tensor:
    """float16 on the CPU: the rounding of fp16 differs between devices, so stored values are always rounded there."""
    return tensor.detach().to("cpu", torch.float32).clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def ascending(indices: Tensor, lut: Tensor) -> tuple[Tensor, Tensor]:
    """(indices [out, in], lut [n, L]) with the entries of every table in ascending order, indices renamed with them."""
    in_order, order = lut.sort(dim=1, stable=True)
    return lookup(order.argsort(dim=1).to(torch.uint8), indices), in_order


def snap_lut(indices: Tensor, lut: Tensor) -> tuple[Tensor, Tensor]:
    """(indices [out, in], lut [n, L]) on the CPU: tables in float16 and ascending, indices renamed with them."""
    indices, lut = ascending(indices.cpu(), to_fp16(lut).float())
    return indices, lut.to(torch.float16)


def _flat(lut: Tensor, indices: Tensor) -> Tensor:
    """Positions int32 [out * in] in the flattened tables."""
    flat = indices.reshape(len(lut), -1).to(torch.int32)
    if len(lut) > 1:
        flat = flat + torch.arange(len(lut), dtype=torch.int32, device=flat.device)[:, None] * lut.shape[1]
    return flat.reshape(-1)
