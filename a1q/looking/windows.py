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

from a1q.errors import StageError, UsageError

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


def check_windows(tokens: np.ndarray, window: int, stride: int, context: int, vocabulary: int) -> None:
    """Refuse what can't be measured: a text of tokens [n] by models of a context and a vocabulary.

    Raises:
        UsageError: naming the option.
    """
    count = len(tokens)
    if count < 2:
        raise UsageError(f"the text is too short: it takes two tokens to predict one, and it has {count}")
    if not 2 <= window <= context:
        raise UsageError(f"--window is {window}; it is between 2 and the model's context of {context}")
    if not 1 <= stride < window:
        raise UsageError(f"--stride is {stride}; it is between 1 and --window less one, {window - 1}")
    if int(tokens.max()) >= vocabulary:
        raise UsageError(f"the tokenizer has tokens beyond the model's vocabulary, {int(tokens.max())} of {vocabulary}")


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
        of positions where both find the same token likeliest. Where one has more logits than the other (vocabularies
        are filled up to round numbers), these two are over the tokens that both have.

    Raises:
        StageError: if a logit is not finite.
    """
    import torch

    from a1q.distill.divergence import precise_kl

    sums = dict.fromkeys(("loss", "reference_loss", "kl", "top1"), 0.0)
    count = 0
    for item in windows(len(tokens), window, stride):
        ids = tokens[item.start : item.stop]
        places = slice(item.first - item.start - 1, len(ids) - 1)
        targets = torch.from_numpy(ids[item.first - item.start :].astype(np.int64))
        mine = _logits(model(ids), places, "the model", item)
        said = torch.log_softmax(mine, dim=-1)
        sums["loss"] -= float(said.gather(-1, targets[:, None]).double().sum())
        if reference is not None:
            theirs = _logits(reference(ids), places, "the reference", item)
            known = torch.log_softmax(theirs, dim=-1)
            sums["reference_loss"] -= float(known.gather(-1, targets[:, None]).double().sum())
            shared = min(mine.shape[-1], theirs.shape[-1])
            if mine.shape != theirs.shape:
                said, known = (torch.log_softmax(logits[:, :shared], dim=-1) for logits in (mine, theirs))
            sums["kl"] += float(precise_kl(known, said).double().sum())
            sums["top1"] += int((known.argmax(-1) == said.argmax(-1)).sum())
        count += len(targets)
        progress(count)
    found = {name: value / count for name, value in sums.items() if reference is not None or name == "loss"}
    found["ppl"] = math.exp(min(found["loss"], 700))
    if reference is not None:
        found["reference_ppl"] = math.exp(min(found["reference_loss"], 700))
    return {**found, "tokens": count}


def _logits(given: Any, places: slice, whose: str, window: Window) -> Tensor:
    import torch

    whole = torch.from_numpy(given) if isinstance(given, np.ndarray) else given.detach().cpu()
    found = whole[places].float()
    finite = torch.isfinite(found).all(dim=-1)
    if not finite.all():
        token = window.first + int((~finite).nonzero()[0])
        raise StageError(f"{whose}'s logits for token {token} are not finite; `a1q inspect` looks for the cause")
    return found
