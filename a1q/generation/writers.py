"""What gives logits token by token: a PyTorch model with its cache of keys and values, or a Core ML package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.errors import StageError
from a1q.generation.sampling import Sampler

if TYPE_CHECKING:
    from a1q.coreml.runner import Runner

PIECE = 512
"""Tokens of a prompt that a model reads at a time: its attention takes memory by their number."""


class Writer(ABC):
    """One text at a time: tokens in, the logits behind the last one out."""

    context: int
    """Tokens that the text may have."""
    vocabulary: int
    device: str
    """What computes, for people."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        """The text so far."""

    def extend(self, tokens: Sequence[int]) -> Any:
        """Go on with these tokens.

        Returns:
            Logits after the last one, float32 [vocabulary].

        Raises:
            StageError: if one is not finite.
        """
        if not tokens or len(self.tokens) + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens behind {len(self.tokens)} don't fit a context of {self.context}")
        try:
            logits = self._extend(tokens)
        except BaseException:  # also Ctrl-C: some layers may know tokens that others don't
            self.tokens = self.tokens[: self._keep(len(self.tokens))]
            raise
        self.tokens += tokens
        if not np.isfinite(logits).all():
            raise StageError(f"the logits behind token {len(self.tokens)} are not finite; is the model whole?")
        return logits

    def begin(self, tokens: Sequence[int]) -> tuple[Any, int]:
        """Make these tokens the text; what it has in common with the text before is not computed again.

        Returns:
            Logits after the last one, and how many tokens were computed.
        """
        same = 0
        for mine, other in zip(self.tokens, tokens[:-1], strict=False):  # the last one's logits are needed
            if mine != other:
                break
            same += 1
        same = self._keep(same) if same < len(self.tokens) else same
        self.tokens = self.tokens[:same]
        return self.extend(tokens[same:]), len(tokens) - same

    @abstractmethod
    def _extend(self, tokens: Sequence[int]) -> Any:
        """The logits behind `tokens`, which follow the text."""

    @abstractmethod
    def _keep(self, count: int) -> int:
        """Forget all but the first `count` tokens, or all where that isn't possible; return how many are kept.

        What was interrupted may have been told in part.
        """


class ModelWriter(Writer):
    """A causal language model of transformers, in evaluation mode."""

    def __init__(self, model: Any):
        super().__init__()
        self._model = model
        self._device = next(model.parameters()).device
        self.device = str(self._device)
        self.context = model.config.max_position_embeddings
        self.vocabulary = model.config.vocab_size
        self._cache: Any = None

    def _extend(self, tokens: Sequence[int]) -> Any:
        import torch
        from transformers import DynamicCache

        if self._cache is None:
            self._cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            for start in range(0, len(tokens), PIECE):
                ids = torch.tensor([tokens[start : start + PIECE]], device=self._device)
                # A first piece with a cache that is empty is an ordinary forward pass.
                logits = self._model(
                    input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
                ).logits
        return logits[0, -1].float().cpu().numpy()

    def _keep(self, count: int) -> int:
        layers = self._cache.layers if self._cache is not None else ()
        if not count or not layers or not all(_can_go_back(layer, count) for layer in layers):
            self._cache = None
            return 0
        for layer in layers:
            layer.crop(count - layer.get_seq_length())  # negative: so many from the end
        return count


def _can_go_back(layer: Any, count: int) -> bool:
    """Whether a layer's cache holds so many tokens: what has slid out of a window can't come back."""
    if getattr(layer, "is_sliding", False) or layer.get_seq_length() < count:
        return False
    return bool(layer.keys.shape[-2] == layer.values.shape[-2])  # else interrupted between the two


class PackageWriter(Writer):
    """A Core ML package, run by Core ML or interpreted."""

    def __init__(self, runner: Runner, device: str):
        super().__init__()
        self._runner = runner
        self.context, self.vocabulary, self.device = runner.context, runner.vocabulary, device

    def _extend(self, tokens: Sequence[int]) -> Any:
        if not self.tokens:
            return self._runner.prefill(tokens)
        for token in tokens:
            logits = self._runner.step(token)
        return logits

    def _keep(self, count: int) -> int:
        return 0  # `prefill` begins anew


def write(
    writer: Writer, logits: Any, most: int, ends: Collection[int], choose: Sampler, penalized: Sequence[int] = ()
) -> Iterator[int]:
    """Continue the writer's text, whose last logits these are, token by token.

    Args:
        most: tokens to write at most; with the text they must fit the context.
        ends: tokens that end the text; the one that does is given too, and is no part of the writer's text.
        penalized: tokens that count as repeated from the start.

    Raises:
        StageError: if a logit is not finite.
    """
    seen = set(penalized)
    for count in range(1, most + 1):
        token = choose(logits, seen)
        seen.add(token)
        yield token
        if token in ends or count == most:
            return
        logits = writer.extend([token])
