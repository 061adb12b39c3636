"""Random negatives: which of the vocabulary outside the top-k a position samples, and how they are stored.

The N = vocabulary - K ids outside a position's top-k, in ascending order, have ranks 0 ... N-1. They are cut into R
strata of equal length N/R, and one point is drawn uniformly in each. Every rank is therefore drawn R/N times on
average, so a sum over the draws times N/R estimates the sum over the whole rest without bias; being stratified, its
variance is at most that of R independent uniform draws, and with R = N it is exact.

A draw is stored as its offset within the stratum: one byte up to N/R = 254, two beyond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

_FINE = 1 << 20
"""Resolution of a draw within its stratum."""


def offset_bytes(rest: int, count: int) -> int:
    """Bytes that one stored offset takes (1, 2 or 4), for `count` draws among `rest` ids."""
    largest = rest // count + 1 if count else 0
    return 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4


def draw_offsets(shape: tuple[int, ...], rest: int, generator: Generator) -> Tensor:
    """Draw int64 offsets of the given shape [..., R], one per stratum of `rest` ids.

    The draws use integers only, so a seed gives the same ids on every machine.
    """
    import torch

    count = shape[-1]
    fine = torch.randint(_FINE, shape, generator=generator)
    point = (torch.arange(count) * _FINE + fine) * rest // (count * _FINE)
    return point - _stratum_starts(rest, count, point.device)


def offsets_to_ids(offsets: Tensor, top_ids: Tensor, vocabulary: int) -> Tensor:
    """Turn offsets [..., R] into token ids [..., R] (int64) outside `top_ids` [..., K] (int64, any order)."""
    import torch

    kept = top_ids.shape[-1]
    ranks = offsets + _stratum_starts(vocabulary - kept, offsets.shape[-1], offsets.device)
    # Below the j-th smallest top id (j from 0) stand `id - j` ids of the rest: that many ranks precede it.
    preceding = top_ids.sort(dim=-1).values - torch.arange(kept, device=top_ids.device)
    return ranks + torch.searchsorted(preceding, ranks, right=True)


def _stratum_starts(rest: int, count: int, device: object) -> Tensor:
    import torch

    return torch.arange(count, device=device) * rest // max(count, 1)  # type: ignore[call-overload]
