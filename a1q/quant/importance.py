"""What a weight is multiplied with, and the weights h that errors get in a fit: E[x²] per input channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-3
"""Least importance relative to the mean: a channel that was silent in the sample still keeps its weights in order."""


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs x of a weight [out, in], and which of its rows count."""

    square: Tensor
    """E[x²] [in]."""
    gram: Tensor | None = None
    """E[x xᵀ] [in, in], whose diagonal is `square`; None where only that was measured."""
    rows: Tensor | None = None
    """[out], >= 0: how much errors of each row count, up to a factor; None where all count alike."""

    def to(self, device: str | torch.device) -> Inputs:
        """The same on another device."""
        moved = (None if part is None else part.to(device) for part in (self.gram, self.rows))
        return Inputs(self.square.to(device), *moved)


def importance_of(weight: Tensor, inputs: Inputs | None) -> Tensor:
    """h [in], positive, with mean about 1, in the type of `weight` [out, in]; ones where nothing is known.

    Raises:
        ValueError: if `square` does not have one finite value >= 0 per input channel.
    """
    if inputs is None:
        return weight.new_ones(weight.shape[1])
    return _relative(inputs.square.to(weight), weight.shape[1], "E[x^2]")


def row_importance_of(weight: Tensor, inputs: Inputs | None) -> Tensor:
    """How much each row's errors count, [out], positive, with mean about 1, in the type of `weight` [out, in].

    Raises:
        ValueError: if `rows` does not have one finite value >= 0 per row.
    """
    if inputs is None or inputs.rows is None:
        return weight.new_ones(weight.shape[0])
    return _relative(inputs.rows.to(weight), weight.shape[0], "the importance of rows")


def gram_of(weight: Tensor, inputs: Inputs | None) -> Tensor | None:
    """E[x xᵀ] [in, in] in the type of `weight` [out, in], where known.

    Raises:
        ValueError: if it is not a finite square matrix with one row per input channel.
    """
    if inputs is None or inputs.gram is None:
        return None
    gram, columns = inputs.gram, weight.shape[1]
    if gram.shape != (columns, columns) or not bool(torch.isfinite(gram).all()):
        raise ValueError(f"E[x x^T] must be {columns}x{columns} finite values, not {tuple(gram.shape)}")
    return gram.to(weight)


def _relative(values: Tensor, count: int, name: str) -> Tensor:
    if values.shape != (count,) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError(f"{name} must be {count} finite values >= 0, not {tuple(values.shape)}")
    mean = values.mean()
    if not bool(mean > 0):
        return torch.ones_like(values)
    return (values / mean).clamp_min(LEAST)
