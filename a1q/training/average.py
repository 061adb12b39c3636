"""Exponential moving average of what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Average:
    """ē ← ē + (1 - d) (w - ē)  after every step, for every tensor of `state`.

    The start weighs little: after n steps d is at most (1 + n) / (10 + n), so that the average follows at first and
    settles later.
    """

    def __init__(self, state: Mapping[str, Tensor], decay: float):
        self._state, self._decay = state, decay
        self.tensors: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in state.items()}

    def add(self, steps: int) -> None:
        """Take in the state after so many steps."""
        import torch

        decay = min(self._decay, (1 + steps) / (10 + steps))
        with torch.no_grad():
            for name, tensor in self._state.items():
                self.tensors[name].lerp_(tensor, 1 - decay)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The state is the average inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        import torch

        with torch.no_grad():
            for name, tensor in self._state.items():
                aside = tensor.detach().clone()
                tensor.copy_(self.tensors[name])
                self.tensors[name].copy_(aside)
