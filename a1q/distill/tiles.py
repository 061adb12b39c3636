"""A walk over a vocabulary, a few thousand rows of the head at a time, and the sums that are taken on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

TILE = 1 << 19
"""Logits that are formed at a time, at most."""
ROWS = (256, 8192)
"""Rows of the head per tile, at least and at most."""


class Matrix(Protocol):
    """What a walk needs of a head: logits = h Wᵀ + bias."""

    bias: Tensor | None

    @property
    def vocabulary(self) -> int:
        """V, rows of W."""

    def rows(self, start: int, stop: int) -> Tensor:
        """W [stop - start, H]."""


def tiles(head: Matrix, weight: Tensor | None, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, H] in the type of the states) of the head, piece by piece.

    Args:
        weight: W [V, H] where it is at hand; else its rows are asked for.
        hidden: h [N, H].
    """
    for start, stop in spans(head, hidden):
        rows = head.rows(start, stop) if weight is None else weight[start:stop]
        yield start, rows.detach().to(hidden.dtype)


def spans(head: Matrix, hidden: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, row behind the last) of every tile, for states [N, H]."""
    least, most = ROWS
    size = min(max(TILE // len(hidden), least), most) // least * least
    for start in range(0, head.vocabulary, size):
        yield start, min(start + size, head.vocabulary)


def tile_logits(hidden: Tensor, rows: Tensor, bias: Tensor | None, start: int, wide: torch.dtype) -> Tensor:
    """[N, n] of a tile, a tensor of their own."""
    logits = (hidden @ rows.T).to(wide)
    return logits if bias is None else logits.add_(bias[start : start + len(rows)].detach().to(wide))


class Partition:
    """logsumexp [N] of logits that come tile by tile, summed relative to the largest so far."""

    def __init__(self, count: int, wide: torch.dtype, device: torch.device):
        self.largest = torch.full((count,), -torch.inf, dtype=wide, device=device)
        self.mass = torch.zeros(count, dtype=wide, device=device)

    def add(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile's logits [N, n] over the temperature, which are written over.

        Returns:
            Their exponentials relative to the largest so far [N, n], and what sums over earlier tiles have to be
            multiplied with to be relative to it too [N].
        """
        largest = torch.maximum(self.largest, scaled.amax(1))
        shares = scaled.sub_(largest[:, None]).exp_()
        fading = (self.largest - largest).exp_()
        self.mass = self.mass * fading + shares.sum(1)
        self.largest = largest
        return shares, fading

    def value(self) -> Tensor:
        """The logsumexp."""
        return self.largest + self.mass.log()


class Guide:
    """A teacher's side of a walk: its tiles beside the student's, with T its temperature.

    Args:
        head: the teacher's.
        hidden: its states [N, H'], which take no gradient.
    """

    def __init__(self, head: Matrix, hidden: Tensor, temperature: float):
        self._head, self._hidden, self._temperature = head, hidden, temperature

    def begin(self, wide: torch.dtype) -> None:
        """Start a walk."""
        count, device = len(self._hidden), self._hidden.device
        self._wide = wide
        self._sum = Partition(count, wide, device)
        self._gap = torch.zeros(count, dtype=wide, device=device)
        self._highest = torch.full((count,), -torch.inf, dtype=wide, device=device)
        self._label = torch.zeros(count, dtype=wide, device=device)
        self.top1 = torch.zeros(count, dtype=torch.int64, device=device)
        """[N], the teacher's most probable token."""

    def add(self, start: int, student: Tensor) -> None:
        """Take in the student's logits [N, n] of the ids from `start` on."""
        own = self._logits(start, start + student.shape[1])
        highest, place = own.max(1)
        better = highest > self._highest
        self._highest = torch.where(better, highest, self._highest)
        self.top1 = torch.where(better, place + start, self.top1)
        self._label = torch.where(better, student.gather(1, place[:, None])[:, 0], self._label)
        scaled = own / self._temperature
        gaps = scaled - student / self._temperature
        shares, fading = self._sum.add(scaled)
        self._gap = self._gap * fading + (shares * gaps).sum(1)

    def end(self) -> tuple[Tensor, Tensor]:
        """The student's logit [N] of `top1`, and the gap [N]: Σ p (t - s) / T - logsumexp(t / T), with t the teacher's
        logits, s the student's. With the student's own partition it is KL(p || q)."""
        self._partition = self._sum.value()
        return self._label, self._gap / self._sum.mass - self._partition

    def probabilities(self, start: int, stop: int) -> Tensor:
        """p [N, stop - start], once the walk has ended."""
        return self._logits(start, stop).div_(self._temperature).sub_(self._partition[:, None]).exp_()

    def _logits(self, start: int, stop: int) -> Tensor:
        rows = self._head.rows(start, stop).detach().to(self._hidden.dtype)
        return tile_logits(self._hidden, rows, self._head.bias, start, self._wide)
