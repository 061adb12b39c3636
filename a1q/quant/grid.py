"""Look-up tables as grids: nearest entry, look-up, sums per entry.

All functions take tables `lut` [n, L] where table i serves row block i of a matrix [out, in], out divisible by n.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from a1q.quant.opaque import opaque
from a1q.quant.workspace import workspace

FLOOR = 1e-12
"""Least |scale| in the division that assigns indices. The forward pass has no floor."""
FP16_MAX = 65504.0
FEW = 4
"""Up to so many entries a comparison per midpoint is fastest on the CPU."""
BLOCK = 1 << 18
"""Elements that are worked on at a time: what is made on the way stays in the cache."""
MOST_PAIRED = 64
"""Up to so many entries a table of all pairs of them stays small."""
PAIRS = {torch.float32: torch.int64, torch.float16: torch.int32, torch.bfloat16: torch.int32}
"""Types as wide as two numbers."""
CELLS, CROWD = 32, 4
"""Of `_in_cells`: cells per edge, and the most edges that may share one."""


@opaque("nearest", lambda values, lut: torch.empty_like(values, dtype=torch.uint8))
def nearest(values: Tensor, lut: Tensor) -> Tensor:
    """Index uint8 [out, in] of the entry of `lut` [n, L] nearest to each of `values` [out, in].

    Entries need not ascend (training may move them past each other). A value midway takes the smaller entry.
    """
    ascending, order = lut.sort(dim=1)
    edges = (ascending[:, 1:] + ascending[:, :-1]) / 2
    blocks = values.reshape(len(lut), -1)
    if lut.shape[1] <= FEW or (values.device.type != "cpu" and lut.shape[1] <= 2 * FEW):
        position = _larger_than(blocks, edges)
    elif len(lut) == 1:
        position = _in_cells(blocks[0], edges[0])[None]
    else:
        position = torch.searchsorted(edges, blocks.contiguous(), out_int32=True).to(torch.uint8)
    if not torch.equal(ascending, lut):
        position = order.to(torch.uint8).gather(1, position.long())
    return position.reshape(values.shape)


def _larger_than(blocks: Tensor, edges: Tensor) -> Tensor:
    """How many of `edges` [n, L - 1] each of `blocks` [n, m] is larger than, uint8, one edge after the other."""
    position = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
    for edge in edges.unbind(1):
        position += blocks > edge[:, None]
    return position


def _in_cells(values: Tensor, edges: Tensor) -> Tensor:
    """How many of `edges` [E], ascending, each of `values` [m] is larger than, uint8.

    The edges' range is cut into even cells; a cell knows how many edges lie before it, and which lie within. Rounding
    keeps order, so that the cells of values are right, however coarse; comparisons decide within.
    """
    low, width = edges[0], edges[-1] - edges[0]
    last = CELLS * len(edges) - 1
    rate = last / width
    if values.device.type != "cpu" or not torch.isfinite(rate):
        return torch.bucketize(values, edges, out_int32=True).to(torch.uint8)

    def cells(numbers: Tensor) -> Tensor:
        # what is not a number becomes the least integer, or 0
        return ((numbers - low) * rate).clamp_(0, last).int().clamp_min_(0)

    own = cells(edges)
    before = torch.searchsorted(own, torch.arange(last + 1, dtype=own.dtype))
    within = int(torch.bincount(own).max())
    if within > CROWD:
        return torch.bucketize(values, edges, out_int32=True).to(torch.uint8)
    place = cells(values)
    position = before.to(torch.uint8).index_select(0, place)
    padded = torch.cat([edges, edges.new_full((within,), torch.inf)])
    for number in range(within):
        # of cells that hold fewer edges the next one lies further on, and no value of theirs is larger than it
        position += values > padded[before + number].index_select(0, place)
    return position


def safe_scale(scale: Tensor) -> Tensor:
    """`scale` with |scale| at least `FLOOR` and its sign kept, for use as a divisor."""
    return scale.abs().clamp_min_(FLOOR).copysign_(scale)


def lookup(lut: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
    """The entries [out, in] that uint8 `indices` [out, in] name; written into `out` [out, in] where given."""
    if _in_pairs(lut, indices):
        return _look_up_in_pairs(lut, indices, torch.empty(indices.shape, dtype=lut.dtype) if out is None else out)
    if out is None:
        return lut.reshape(-1).index_select(0, _flat(lut, indices)).reshape(indices.shape)
    torch.index_select(lut.reshape(-1), 0, _flat(lut, indices), out=out.view(-1))
    return out


def _in_pairs(lut: Tensor, indices: Tensor) -> bool:
    """Whether `_look_up_in_pairs` can do the work, and faster."""
    return (
        lut.numel() <= MOST_PAIRED
        and len(lut) == 1
        and lut.dtype in PAIRS
        and indices.numel() > lut.numel() ** 2 * 256
        and indices.shape[-1] % 2 == 0
        and indices.is_contiguous()
        and indices.storage_offset() % 2 == 0
        and indices.device.type == "cpu"
        and not (lut.requires_grad and torch.is_grad_enabled())
        and sys.byteorder == "little"
    )


def _look_up_in_pairs(lut: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """`lookup` two neighbours at a time: their indices are one 16-bit number, their entries one element of a table."""
    entries, last = lut.reshape(-1), lut.numel() - 1
    numbers = torch.arange((last << 8) + last + 1)
    pairs = torch.stack([entries[(numbers & 255).clamp_(max=last)], entries[numbers >> 8]], dim=1)
    pairs, neighbours = pairs.view(PAIRS[lut.dtype]).reshape(1, -1), indices.view(torch.int16).reshape(1, -1)
    places = workspace("places", (1, BLOCK), torch.int64, indices.device)
    for part, numbers in zip(
        out.view(1, -1).view(pairs.dtype).split(BLOCK, dim=1), neighbours.split(BLOCK, dim=1), strict=True
    ):
        _gather(pairs, places[:, : part.shape[1]].copy_(numbers), part)
    return out


def _gather(table: Tensor, places: Tensor, out: Tensor) -> None:
    """table [1, n] at int64 `places` [1, m] into out [1, m]: as many threads as there are; `index_select` has one."""
    ways = torch.get_num_threads()
    if places.shape[1] % ways:
        ways = 1
    torch.gather(table.expand(ways, -1), 1, places.view(ways, -1), out=out.view(ways, -1))


def sums_per_entry(indices: Tensor, values: Tensor, lut: Tensor) -> Tensor:
    """Sum of `values` [out, in] over the places that use each entry: [n, L], in the type of `values`."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        # bincount has no deterministic form on CUDA, and none of a known size; index_add_ has both.
        flat = _flat(lut, indices)
        return values.new_zeros(lut.numel()).index_add_(0, flat, values.reshape(-1)).reshape(lut.shape)
    flat = indices.reshape(-1) if len(lut) == 1 else _flat(lut, indices)
    parts = zip(flat.split(BLOCK), values.reshape(-1).split(BLOCK), strict=True)
    total = sum(torch.bincount(places.int(), part, lut.numel()).double() for places, part in parts)
    return torch.as_tensor(total).to(values.dtype).reshape(lut.shape)


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
