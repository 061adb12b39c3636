"""A decoder run block by block: the hidden states between two of its layers, and nothing else of what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from a1q.errors import StageError
from a1q.models.positions import passed

if TYPE_CHECKING:
    from numpy import ndarray

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block takes beside the hidden states: positional ones, named ones."""


class BlockStream:
    """The hidden states at one boundary of the decoder layers of a causal language model, batch by batch.

    They start as the input of the first layer. Memory holds those of all sequences once, on the CPU and in the type the
    model computes in, and the activations of one layer for one batch. Layers may change in place between runs; other
    parts of the model give what they gave when the stream was made.
    """

    names: list[str]
    """Module names of the decoder layers, in the order they run."""
    hidden: list[Tensor]
    """Per batch [b, L, hidden]: the input of the next layer."""

    def __init__(self, model: Any, tokens: ndarray, batch_size: int, borders: ndarray | None = None):
        """Run the model over `tokens` (integers [n, L]) up to its first layer.

        Args:
            borders: bool [n, L], where documents begin that attention stays within; None: it sees all before.

        Raises:
            StageError: if the model has no list of decoder layers.
        """
        self._model = model
        self._decoder = model.base_model
        self.names, self._blocks = decoder_layers(model)
        self.device = next(model.parameters()).device
        starts = range(0, len(tokens), batch_size)
        self._ids = [torch.from_numpy(tokens[start : start + batch_size].astype("int64")) for start in starts]
        self._borders = [
            None if borders is None else torch.from_numpy(borders[start : start + batch_size].copy())
            for start in starts
        ]
        self._arguments: dict[Any, list[Arguments]] = {}
        self.hidden = [self._enter(number)[0] for number in range(len(self._ids))]

    def run(self, index: int, hidden: Tensor, number: int) -> Tensor:
        """The output [b, L, hidden] of layer `index` for `hidden` in the place of batch `number`; differentiable."""
        positional, named = self._beside(number)[index]
        return states_of(self._blocks[index](hidden.to(self.device), *positional, **named))

    def advance(self, index: int, progress: Callable[[int], None] = lambda done: None) -> None:
        """Put the output of layer `index` in the place of its input, `hidden`.

        Args:
            progress: called with the number of batches done.
        """
        with torch.no_grad():
            for number, hidden in enumerate(self.hidden):
                self.hidden[number] = self.run(index, hidden, number).cpu()
                progress(number + 1)

    def leave(self, number: int) -> Tensor:
        """What the head takes [b, L, hidden] when `hidden` of batch `number` has passed the last layer."""
        states = self.hidden[number].to(self.device)
        with torch.no_grad(), _replaced(self._blocks, lambda _index, _hidden, _rest, _named: states):
            return self._decoder(**passed(self._ids[number].to(self.device))).last_hidden_state

    def logits(self, hidden: Tensor, number: int, positions: slice = slice(None)) -> Tensor:
        """The model's logits [b, l, V] where `hidden` [b, l, hidden] of batch `number` has passed the last layer.

        They are differentiable where `hidden` requires a gradient.

        Args:
            positions: which l of the L positions these are.
        """
        states, ids = hidden.to(self.device), self._ids[number][:, positions].to(self.device)
        with (
            torch.set_grad_enabled(hidden.requires_grad),
            _replaced(self._blocks, lambda _index, _hidden, _rest, _named: states),
        ):
            return self._model(**passed(ids)).logits

    def _beside(self, number: int) -> list[Arguments]:
        """What layers take beside the states of batch `number`: the same for all batches of a size where nothing
        separates documents, else kept for the last batch alone, as every one has its own."""
        place = len(self._ids[number]) if self._borders[number] is None else ("batch", number)
        if place not in self._arguments:
            if self._borders[number] is not None:
                self._arguments.clear()
            self._arguments[place] = self._enter(number)[1]
        return self._arguments[place]

    def _enter(self, number: int) -> tuple[Tensor, list[Arguments]]:
        """The input of the first layer for batch `number`, and what layers take beside it."""
        first: list[Tensor] = []
        arguments: list[Arguments] = []

        def keep(index: int, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
            if index == 0:
                first.append(hidden)
            arguments.append((rest, named))
            return hidden

        with torch.no_grad(), _replaced(self._blocks, keep):
            self._decoder(**passed(self._ids[number].to(self.device), self._borders[number]))
        return first[0].cpu(), arguments


def decoder_layers(model: Any) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of the decoder layers: the first list of as many modules as the config says."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{index}" for index in range(count)], list(module)
    raise StageError(f"{type(model).__name__} has no list of {count} decoder layers")


@contextmanager
def _replaced(blocks: list[nn.Module], stand_in: Callable[..., Tensor]) -> Iterator[None]:
    """Let `stand_in(index, hidden, rest, named)` answer for the blocks."""
    for index, block in enumerate(blocks):

        def answer(hidden: Tensor, *rest: Any, _index: int = index, **named: Any) -> Tensor:
            return stand_in(_index, hidden, rest, named)

        block.forward = answer
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def states_of(output: Any) -> Tensor:
    """The hidden states in what a layer returns, in some families the first of several things."""
    return output[0] if isinstance(output, tuple) else output
