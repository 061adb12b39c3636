"""Tables and rows of numbers as bytes: what `a1q.quant.planes` can multiply.

One byte says a table where its entries lie near whole multiples of a step: T ≈ s (c + o) with whole c from -128 to 127.
Those of up to four entries do to about a thousandth, evenly spaced ones exactly. Two bytes say any numbers whatever as
whole multiples, 256 c₁ + c₂, of a 65278th of their range around zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST, HIGHEST = -128, 127
SPANS = tuple(range(HIGHEST + 1, HIGHEST - LOWEST + 1))
"""Steps between the first entry and the last that are tried: a table that fits fewer also fits a multiple of them."""
PEAKS = tuple(range((HIGHEST + 1) // 2, HIGHEST + 1))
"""The same of tables without offset: what the largest entry is."""
WITHOUT = 2e-5
"""Relative error up to which tables have no offset, which costs a sum at every product."""
MOST_TRIED = 16
"""Of many tables of more entries only evenly spaced ones are looked for; others never lie near enough."""
TWO_BYTES = HIGHEST * 256 + HIGHEST
TABLES = 1 << 12
"""That are worked on at a time."""


@dataclass(frozen=True)
class ByteTables:
    """T ≈ scale (codes + offset), all of n tables of L entries."""

    codes: Tensor
    """int8 [n, L]."""
    scale: Tensor
    """float64 [n]."""
    offset: Tensor
    """float64 [n]."""
    error: Tensor
    """float64 [n]: root mean square of the difference, relative to that of the table."""


def byte_tables(tables: Tensor) -> ByteTables:
    """The nearest that was found to `tables` [n, L], scale and offset by least squares."""
    found = [_some(part.double()) for part in tables.split(TABLES)]
    return ByteTables(*(torch.cat([getattr(part, name) for part in found]) for name in ByteTables.__annotations__))


def two_bytes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes int8 [2, n, m], scales float64 [2, n]) of numbers [n, m], each row by itself."""
    scale = (numbers.abs().amax(1).double() / TWO_BYTES).clamp_min(torch.finfo(torch.float32).tiny)
    whole = (numbers / scale[:, None].to(numbers.dtype)).round_().clamp_(-TWO_BYTES, TWO_BYTES).to(torch.int32)
    high = (whole + 128) >> 8
    return torch.stack([high, whole - (high << 8)]).to(torch.int8), torch.stack([scale * 256, scale])


def _some(tables: Tensor) -> ByteTables:
    low, high = tables.amin(1), tables.amax(1)
    steps = tables.shape[1] - 1
    if min(tables.shape) <= MOST_TRIED:
        spans, peaks = tables.new_tensor(SPANS), tables.new_tensor(PEAKS)
    else:
        spans, peaks = tables.new_tensor([SPANS[-1] // steps * steps]), tables.new_tensor(PEAKS[-1:])
    width = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    shifted = (((tables - low[:, None]) / width[:, None])[:, None] * spans[:, None]).round_() + LOWEST
    mean = shifted.mean(2)
    around, whole = shifted - mean[..., None], tables - tables.mean(1, keepdim=True)
    scale = (around * whole[:, None]).sum(2) / around.square().sum(2).clamp_min(1)
    offset = tables.mean(1)[:, None] / scale.where(scale > 0, 1) - mean
    with_offset = _best(tables, shifted, scale, offset)

    largest = torch.maximum(high, -low).clamp_min(torch.finfo(torch.float64).tiny)
    plain = ((tables / largest[:, None])[:, None] * peaks[:, None]).round_()
    scale = (plain * tables[:, None]).sum(2) / plain.square().sum(2).clamp_min(1)
    without = _best(tables, plain, scale, torch.zeros_like(scale))

    enough = without.error <= with_offset.error.clamp_min(WITHOUT)
    return ByteTables(
        torch.where(enough[:, None], without.codes, with_offset.codes),
        *(
            torch.where(enough, getattr(without, name), getattr(with_offset, name))
            for name in ("scale", "offset", "error")
        ),
    )


def _best(tables: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> ByteTables:
    """Of several ways [n, k] with codes [n, k, L], the nearest to each table."""
    missed = tables[:, None] - scale[..., None] * (codes + offset[..., None])
    square = missed.square().mean(2)
    best = square.argmin(1, keepdim=True)
    size = tables.square().mean(1).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return ByteTables(
        codes.take_along_dim(best[..., None], 1)[:, 0].to(torch.int8),
        scale.gather(1, best)[:, 0],
        offset.gather(1, best)[:, 0],
        square.gather(1, best)[:, 0].sqrt() / size,
    )
