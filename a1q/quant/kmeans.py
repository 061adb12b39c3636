"""Weighted k-means on one axis, for look-up tables [n, L]; deterministic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from a1q.quant.grid import nearest, sums_per_entry

SAMPLE = 1 << 20
"""Quantiles are taken of at most this many values per table, evenly spaced through them."""
CLUSTERED = 1 << 22
"""Tables are fitted to at most about this many values each: an embedding has 150 million, 4 million say the same."""


def quantile_start(values: Tensor, count: int) -> Tensor:
    """`count` values of each row of `values` [n, m], ascending: [n, count].

    They stand at the levels Φ(√3 Φ⁻¹((k + ½) / count)): squared error asks for entries as dense as the cube root of
    the values' density (Panter and Dite, 1951), which a normal distribution has √3 times wider.
    """
    sample = values[:, :: max(1, values.shape[1] // SAMPLE)].sort(dim=1).values
    middles = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count
    levels = torch.special.ndtr(3**0.5 * torch.special.ndtri(middles))
    return sample[:, (levels * (sample.shape[1] - 1)).round().long()]


def lloyd(values: Tensor, use: Tensor, lut: Tensor, rounds: int) -> Tensor:
    """Lloyd's iteration: the weighted mean of each cell in turn; stops early once no index changes.

    Of more than `CLUSTERED` values per table, evenly spaced ones are taken.

    Args:
        values: [out, in]; row block i belongs to table i.
        use: weights >= 0, [out, in].
        lut: start [n, L], rows ascending.

    Returns:
        [n, L], rows ascending. Entries that attract no weight stay where they are.
    """
    values, use = _thinned(values, use, len(lut))
    indices = nearest(values, lut)
    for _ in range(rounds):
        mass = sums_per_entry(indices, use, lut)
        mean = sums_per_entry(indices, use * values, lut) / mass.clamp_min(torch.finfo(mass.dtype).tiny)
        lut = torch.where(mass > 0, mean, lut)
        moved = nearest(values, lut)
        if torch.equal(moved, indices):
            break
        indices = moved
    return lut


def _thinned(values: Tensor, use: Tensor, tables: int) -> tuple[Tensor, Tensor]:
    """Both [out, in] as they are, or about `CLUSTERED` of each table's, [tables, m]."""
    count, columns = values.numel() // tables, values.shape[1]
    stride = -(-count // CLUSTERED)
    if stride == 1:
        return values, use
    while math.gcd(stride, columns) > 1:  # else some columns would never be looked at
        stride += 1
    return tuple(x.reshape(tables, -1)[:, ::stride].contiguous() for x in (values, use))  # type: ignore[return-value]
