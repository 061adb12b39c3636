"""How far a package's logits are from those of its model: figures over many positions, taken one position at a time.

A vocabulary of 150,000 and 200 positions would be 240 MB in float64 for either side, so nothing is kept but scalars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from a1q.coreml.operations import Array

DECISIVE = 4.0
"""By how many times the largest error the first choice must lead for a change of it to be a defect."""


@dataclass(frozen=True)
class Figures:
    """One way of computing a package, against the model it came from."""

    positions: int
    """Logit vectors compared."""
    cosine: float
    """Smallest cosine of a logit vector; 0 where numbers are not finite."""
    cosine_mean: float
    max_error: float
    """Largest difference of a logit."""
    relative_error: float
    """Largest difference of a logit to the model with its weights rounded to fp16, over the standard deviation of that
    position's logits: 1e-3 and less in fp32 unless the graph or a weight is another."""
    kl: float
    """Mean KL divergence in nats, model to package."""
    kl_max: float
    agreement: float
    """Share of the positions where both rank the same token first."""
    decisive: float
    """Share of the positions where the model's first choice leads by more than 4 times `max_error`."""
    decisive_agreement: float
    """Share of these where both rank the same token first; 1 if there are none."""
    choice_agreement: float
    """Share of the model's own continuation that the package chooses too when it is fed with it."""
    greedy_agreement: float
    """Share of the model's own continuation that the package writes by itself before it first differs."""
    overflows: int
    """Numbers that were not finite."""
    overflow_at: str
    """The first operation that had one, as `part: operation`."""

    def as_json(self) -> dict[str, Any]:
        """By name; None for what is not finite, which JSON can't say."""
        found = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


class Tally:
    """Collects positions."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def add(self, expected: Array, rounded: Array, found: Array) -> None:
        """One position: logits [vocabulary] of the model, of the model in fp16 weights, and of the package."""
        expected, rounded, found = (logits.astype(np.float64) for logits in (expected, rounded, found))
        first = int(expected.argmax())
        second = np.partition(expected, -2)[-2] if len(expected) > 1 else -np.inf
        margin = expected[first] - second
        if not np.isfinite(found).all():
            self._rows.append((0.0, math.inf, math.inf, math.inf, 0.0, margin))
            return
        error = float(np.abs(expected - found).max())
        norms = np.linalg.norm(expected) * np.linalg.norm(found)
        cosine = float(expected @ found / norms) if norms else float(error == 0)
        rest, spread = float(np.abs(rounded - found).max()), float(rounded.std())
        relative = rest / spread if spread else (math.inf if rest else 0.0)
        kl = divergence(expected, found)
        self._rows.append((cosine, error, relative, kl, float(found.argmax() == first), margin))

    def figures(self, choice_agreement: float, greedy_agreement: float, overflows: Mapping[str, int]) -> Figures:
        """The figures of all positions so far, with those that come from elsewhere."""
        cosine, error, relative, kl, same, margin = np.array(self._rows).T
        decisive = margin > DECISIVE * error.max()
        return Figures(
            positions=len(cosine),
            cosine=float(cosine.min()),
            cosine_mean=float(cosine.mean()),
            max_error=float(error.max()),
            relative_error=float(relative.max()),
            kl=float(kl.mean()),
            kl_max=float(kl.max()),
            agreement=float(same.mean()),
            decisive=float(decisive.mean()),
            decisive_agreement=float(same[decisive].mean()) if decisive.any() else 1.0,
            choice_agreement=choice_agreement,
            greedy_agreement=greedy_agreement,
            overflows=sum(overflows.values()),
            overflow_at=next(iter(overflows), ""),
        )


def divergence(expected: Array, found: Array) -> float:
    """KL in nats of the distribution of one vector of logits to that of another, both float64."""
    p, q = log_softmax(expected), log_softmax(found)
    return float(np.exp(p) @ (p - q))


def log_softmax(x: Array) -> Array:
    """Logarithms of the softmax of a vector."""
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())
