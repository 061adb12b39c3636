"""Weighted k-means on one axis, for look-up tables [n, L]; deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

from a1q.quant.grid import nearest, sums_per_entry

SAMPLE = 1 << 20
"""Quantiles are taken of at most this many values, evenly spaced through the tensor."""


def quantile_start(values: Tensor, count: int) -> Tensor:
    """`count` ascending entries at the middles of equal shares of the values' mass, in their type [count].

    Shares are of the cube root of the density (Panter and Dite, 1951: where squared error asks for entries), which
    for a normal distribution means the quantiles of one √3 times wider.
    """
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.numel() // SAMPLE)].double()
    shares = (torch.arange(count, dtype=torch.float64, device=flat.device) + 0.5) / count
    mean, width = flat.mean(), flat.std(unbiased=False)
    return (mean + width * 3**0.5 * torch.special.ndtri(shares)).to(values.dtype)


def lloyd(values: Tensor, use: Tensor, lut: Tensor, rounds: int) -> Tensor:
    """Lloyd's iteration: the weighted mean of each cell in turn; stops early once no index changes.

    Args:
        values: [out, in]; row block i belongs to table i.
        use: weights >= 0, [out, in].
        lut: start [n, L], rows ascending.

    Returns:
        [n, L], rows ascending. Entries that attract no weight stay where they are.
    """
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
