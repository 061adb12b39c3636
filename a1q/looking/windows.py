"""Perplexity over sliding windows, and how far a model is from another, over text of any length.

Each token but the first is predicted once. Windows of `window` tokens begin every `stride` tokens; of a window, the
tokens that none before it predicted count. So a token sees at least window - stride tokens before it, where there are
as many (the usual way for models of fixed context, as in transformers' guide "Perplexity of fixed-length models").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Logits = Callable[[np.ndarray], Any]
"""Tokens int64 [L] -> logits [L, vocabulary], a tensor or an array."""


@dataclass(frozen=True)
class Window:
    """A stretch of the text, and what of it counts."""

    start: int
    stop: int
    first: int
    """The first token of the text whose prediction counts here."""


def windows(count: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over a text of `count` tokens."""
    done = 1
    for start in range(0, max(count - 1, 0), stride):
        stop = min(start + window, count)
        yield Window(start, stop, done)
        done = stop
        if stop == count:
            return


def check_windows(count: int, window: int, stride: int, context: int) -> None:
    """Refuse what can't be measured.

    Raises:
        UsageError: naming the option.
    """
    if count < 2:
        raise UsageError(f"the text has {count} tokens, and it takes two to predict one")
    if not 2 <= window <= context:
        raise UsageError(f"--window is {window}; it is between 2 and the model's context of {context}")
    if not 1 <= stride < window:
        raise UsageError(f"--stride is {stride}; it is between 1 and --window less one, {window - 1}")


def measure(
    tokens: np.ndarray,
    model: Logits,
    reference: Logits | None,
    window: int,
    stride: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Figures of `model`, and against `reference`, over tokens [n].

    Logits are taken in float32 and summed in float64.

    Args:
        progress: called with the number of tokens that are done.

    Returns:
        `loss` in nats per token, `ppl` its exponential, `tokens` predicted; with a reference also `reference_loss`,
        `reference_ppl`, `kl` of model from reference (nats per token, over the same positions), and `top1`, the share
        of positions where both find the same token likeliest.
    """
    import torch

    from a1q.distill.divergence import kl

    sums = dict.fromkeys(("loss", "reference_loss", "kl", "top1"), 0.0)
    count = 0
    for item in windows(len(tokens), window, stride):
        ids = tokens[item.start : item.stop]
        places = slice(item.first - item.start - 1, len(ids) - 1)
        targets = torch.from_numpy(ids[item.first - item.start :].astype(np.int64))
        said = _log_probabilities(model(ids), places)
        sums["loss"] -= float(said.gather(-1, targets[:, None]).double().sum())
        if reference is not None:
            known = _log_probabilities(reference(ids), places)
            sums["reference_loss"] -= float(known.gather(-1, targets[:, None]).double().sum())
            sums["kl"] += float(kl(known, said).double().sum())
            sums["top1"] += int((known.argmax(-1) == said.argmax(-1)).sum())
        count += len(targets)
        progress(count)
    found = {name: value / count for name, value in sums.items() if reference is not None or name == "loss"}
    found["ppl"] = math.exp(min(found["loss"], 700))
    if reference is not None:
        found["reference_ppl"] = math.exp(min(found["reference_loss"], 700))
    return {**found, "tokens": count}


def _log_probabilities(logits: Any, places: slice) -> Tensor:
    import torch

    found = torch.from_numpy(logits) if isinstance(logits, np.ndarray) else logits.detach().cpu()
    return torch.log_softmax(found[places].float(), dim=-1)
