"""Tables that are symmetric about zero, told by positive increments: ±d_1, ±(d_1 + d_2), ...

However they train, entries ascend, and neighbours stay apart by at least 2 units in the last place that fp16 has at the
largest entry, so that rounding never makes two of them one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from a1q.quant.lowrank import Fit

ROUNDS = 4
"""Rounds of least squares that get a scale used to a table made symmetric."""


def entries_of(increments: Tensor) -> Tensor:
    """The table [2 n], ascending, that `increments` [n] tell.

    Those below the least distance count as that distance, with the identity as gradient: one that fell below may rise.
    """
    with torch.no_grad():
        least = _least_distance(increments.clamp_min(0).sum())
        least = _least_distance(increments.clamp_min(least).sum())
        lift = increments.clamp_min(least) - increments
    upper = (increments + lift).cumsum(0)
    return torch.cat([-upper.flip(0), upper])


def increments_of(lut: Tensor) -> Tensor:
    """Increments [n] of the symmetric table nearest to `lut` [2 n], ascending."""
    half = len(lut) // 2
    upper = (lut[half:] - lut[:half].flip(0)) / 2
    return torch.cat([upper[:1], upper.diff()])


def make_symmetric(fit: Fit, weight: Tensor, importance: Tensor, rows: Tensor) -> None:
    """Put the nearest symmetric table in place, and fit indices and scale to it. Arguments as `lowrank.improve`."""
    from a1q.quant.lowrank import assign, improve

    fit.lut = entries_of(increments_of(fit.lut))
    fit.indices = assign(weight, fit.lut, fit.scale())
    for _ in range(ROUNDS):
        improve(fit, weight, importance, rows, learn_lut=False)


def _least_distance(largest: Tensor) -> Tensor:
    """Twice the distance of neighbours in fp16 at `largest`: 2⁻¹⁰ of the power of two below it, times two."""
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent - 10)
