"""The one definition of each divergence and of cross-entropy; every loss and every measurement is made of these.

Log-probabilities p (the teacher's) and q (the student's) come along the last dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 0.5
"""Below this difference of log-probabilities the series of e^d is better than the difference of two probabilities."""


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ p log(p/q) over the last dimension, from log-probabilities; in nats."""
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def partial_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ (p log(p/q) - p + q) over the last dimension, from log-probabilities; in nats.

    Over a whole vocabulary that is `kl`, as p and q both sum to one; over a part of one no term is negative.
    """
    p = teacher.exp()
    return (p * (teacher - student) - p + student.exp()).sum(dim=-1)


def precise_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """`kl` over a whole vocabulary, for distributions so near to each other that its terms, which are of both signs
    and cancel to second order, would lose it in rounding: those of `partial_kl`, by e^d - 1 - d where d is small.
    """
    import torch

    p, d = teacher.exp(), student - teacher
    return torch.where(d.abs() < SMALL, p * (torch.expm1(d) - d), student.exp() - p - p * d).sum(dim=-1)


def cross_entropy(partition: Tensor, label: Tensor, counts: Tensor | None = None, over: float | None = None) -> Tensor:
    """Mean over positions of -log q(label), in nats.

    Args:
        partition: logsumexp of the logits, [...].
        label: the label's logit, [...].
        counts: bool [...], which positions are meant; None for all. Where there are none the mean is 0.
        over: how many positions to divide by; None: by those that are meant.
    """
    return mean_over(partition - label, counts, over)


def mean_over(values: Tensor, counts: Tensor | None = None, over: float | None = None) -> Tensor:
    """Mean of `values` [...] over positions, chosen and counted as in `cross_entropy`."""
    if counts is None:
        return values.mean() if over is None else values.sum() / over
    total = values.where(counts, 0).sum()
    return total / counts.sum().clamp_min(1) if over is None else total / max(over, 1e-12)
