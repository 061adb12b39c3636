"""Let a package write: prompt in, tokens out, one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from a1q.coreml.figures import log_softmax
from a1q.errors import StageError

if TYPE_CHECKING:
    from a1q.coreml.operations import Array
    from a1q.coreml.runner import Runner


class Sampler:
    """Chooses tokens.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: same seed, same choices.
    """

    def __init__(self, temperature: float, top_p: float, seed: int):
        self.temperature = temperature
        self.top_p = top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: Array) -> int:
        """One token for logits [vocabulary]."""
        if not self.temperature:
            return int(logits.argmax())
        probabilities = np.exp(log_softmax(logits.astype(np.float64) / self.temperature))
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        kept = order[before < self.top_p]
        share = probabilities[kept] / probabilities[kept].sum()
        return int(self._random.choice(kept, p=share))


def write(runner: Runner, prompt: Sequence[int], most: int, ends: Collection[int], choose: Sampler) -> Iterator[int]:
    """Continue `prompt` token by token.

    Args:
        most: tokens to write at most; with the prompt they must fit the runner's context.
        ends: tokens that end the text; the one that does is given too.

    Raises:
        StageError: if a logit is not finite.
    """
    logits = runner.prefill(prompt)
    for count in range(1, most + 1):
        if not np.isfinite(logits).all():
            raise StageError(f"token {count} has logits that are not finite; `a1q verify` finds the first place")
        token = choose(logits)
        yield token
        if token in ends or count == most:
            return
        logits = runner.step(token)
