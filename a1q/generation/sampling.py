"""How a token is chosen from logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDING = 1e-12
"""What sums of probabilities may be off by."""


@dataclass(frozen=True)
class Sampling:
    """How text is drawn."""

    temperature: float = 0.7
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Of tokens that the text has already, positive logits are divided by it, negative ones multiplied (Keskar et al.,
    2019, arXiv:1909.05858); 1 does nothing."""


class Sampler:
    """Chooses tokens: penalty, temperature, `top_k`, `top_p`, in the order that transformers has them.

    Args:
        seed: same seed, same choices.
    """

    def __init__(self, sampling: Sampling, seed: int):
        self.sampling = sampling
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: Any, seen: Collection[int] = ()) -> int:
        """One token for logits [vocabulary] of a text that consists of the tokens `seen`."""
        if self.sampling.repetition_penalty != 1 and seen:
            logits = np.array(logits, dtype=np.float64)
            known = np.fromiter(set(seen), dtype=np.int64)
            penalty = self.sampling.repetition_penalty
            logits[known] = np.where(logits[known] > 0, logits[known] / penalty, logits[known] * penalty)
        if not self.sampling.temperature:
            return int(np.argmax(logits))
        kept, shares = candidates(np.asarray(logits, np.float64), self.sampling)
        return int(self._random.choice(kept, p=shares))


def candidates(logits: Any, sampling: Sampling) -> tuple[Any, Any]:
    """The tokens [k] that may be drawn, likeliest first, and their probabilities, of logits float64 [vocabulary]."""
    with np.errstate(over="ignore"):  # divided by next to nothing, all but the likeliest are at minus infinity
        odds = np.exp((logits - logits.max()) / sampling.temperature)
    count = min(sampling.top_k or len(odds), len(odds))
    if sampling.top_p == 1 and count == len(odds):
        return np.arange(len(odds)), odds / odds.sum()
    # Few tokens hold most of the probability: sorting those alone takes a tenth of the time of sorting all.
    size = min(count, 256)
    while True:
        some = np.argpartition(-odds, size - 1)[:size] if size < len(odds) else np.arange(len(odds))
        order = some[np.lexsort((some, -odds[some]))][:size]
        whole = odds.sum() if count == len(odds) else None
        if size == count or (whole is not None and odds[order].sum() >= sampling.top_p * whole):
            break
        size = min(count, size * 8)
    shares = odds[order] / (odds[order].sum() if whole is None else whole)
    before = np.cumsum(shares) - shares
    kept = order[before < sampling.top_p - ROUNDING]
    return kept, odds[kept] / odds[kept].sum()
