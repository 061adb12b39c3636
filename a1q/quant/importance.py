"""The weights h that errors get in a fit: E[x²] per input channel."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-3
"""Least importance relative to the mean: a channel that was silent in the sample still keeps its weights in order."""


def importance_of(weight: Tensor, statistics: Tensor | None) -> Tensor:
    """h [in], positive, with mean about 1, in the type of `weight` [out, in]; ones without statistics.

    Raises:
        ValueError: if the statistics do not have one finite value >= 0 per input channel.
    """
    columns = weight.shape[1]
    if statistics is None:
        return torch.ones(columns, dtype=weight.dtype, device=weight.device)
    if statistics.shape != (columns,) or not bool(torch.isfinite(statistics).all()) or bool((statistics < 0).any()):
        raise ValueError(f"statistics must be {columns} finite values >= 0, not {tuple(statistics.shape)}")
    h = statistics.to(weight)
    mean = h.mean()
    if not bool(mean > 0):
        return torch.ones_like(h)
    return (h / mean).clamp_min(LEAST)
