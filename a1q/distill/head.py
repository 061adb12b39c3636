"""What a loss asks of a head, without the [tokens, vocabulary] tensor: logsumexps, and the logits of chosen ids.

The vocabulary is walked in tiles of a few thousand rows of the head W [V, H]. With h a position's state, l = h Wᵀ:

* The partition  P = logsumexp(l / T)  is summed as tiles come, relative to the largest so far (Milakov and Gimelshein,
  2018). Its gradient by h is  Σ_v softmax(l / T)_v W_v / T,  a sum over the same tiles: where the head stands still it
  is taken along in the forward pass (as attention's output is, Dao et al., 2022), and nothing is computed twice.
* A head that trains needs  dL/dW_v = Σ_positions (dL/dl_v) h,  which wants P beforehand: logits are computed again,
  tile by tile, in the backward pass. That is one product more, of four.

Rows of a quantized head that stands still are made tile by tile, and the whole weight never is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from a1q.quant.module import QuantModule
from a1q.quant.tied import TiedHead

TILE = 1 << 19
"""Logits that are formed at a time, at most."""
ROWS = (256, 8192)
"""Rows of the head per tile, at least and at most."""
PAIRS = 4096
"""Chosen logits whose rows of the head are gathered at a time in the backward pass."""


class Head:
    """The last matrix of a model: logits = h Wᵀ + bias, and nothing else.

    Args:
        module: a linear, a quantized linear without an adapter, or a head tied to a quantized embedding.
    """

    def __init__(self, module: nn.Module):
        source = module.source if isinstance(module, TiedHead) else module
        assert isinstance(source, QuantModule | nn.Linear)
        self._source = source
        self.bias: Tensor | None = module.bias  # type: ignore[assignment]

    @property
    def vocabulary(self) -> int:
        """V, rows."""
        if isinstance(self._source, QuantModule):
            return self._source.shape[0]
        return self._source.out_features

    @property
    def trains(self) -> bool:
        """Whether W gets a gradient."""
        return torch.is_grad_enabled() and any(part.requires_grad for part in self._source.parameters())

    def weight(self) -> Tensor:
        """W [V, H], differentiable."""
        return self._source.weight

    def rows(self, start: int, stop: int) -> Tensor:
        """W [stop - start, H]; of a quantized head no other row is made."""
        if isinstance(self._source, QuantModule):
            return self._source.rows(start, stop)
        return self._source.weight[start:stop]

    def partitions_and_picked(
        self, hidden: Tensor, index: Tensor, temperatures: Sequence[float]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """logsumexp(l / T) [B, L] for every T, and l [B, L, I] at `index`; in float32, or float64 of such states.

        Products are made in the type that autocast says, or that of the states. Differentiable by the states and,
        where it trains, by the head; a bias stands still.

        Args:
            hidden: h [B, L, H].
            index: int64 [B, L, I].
        """
        weight = self.weight() if self.trains else None
        places = index.shape[:-1]
        kind = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            kind = torch.get_autocast_dtype(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            found = _Answers.apply(
                hidden.reshape(-1, hidden.shape[-1]).to(kind),
                None if weight is None else weight.to(kind),
                self,
                index.reshape(-1, index.shape[-1]),
                tuple(temperatures),
            )
        return tuple(part.reshape(places) for part in found[:-1]), found[-1].reshape(index.shape)


def head_of(model: Any) -> Head | None:
    """The head of a causal language model; None where it computes something that `Head` does not."""
    module = model.get_output_embeddings()
    if isinstance(module, QuantModule):
        known = module.lora_A is None and module.form == "dense"
    elif isinstance(module, TiedHead):
        known = module.source.form == "dense"
    else:
        known = type(module) is nn.Linear
    return Head(module) if known and _gives_the_logits(model, module) else None


def _gives_the_logits(model: Any, module: nn.Module) -> bool:
    """Whether a model's logits are its head's output: some families scale or cap them."""
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.config.vocab_size
    training = model.training
    model.eval()
    with torch.no_grad():
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        same = torch.allclose(module(states), model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    model.train(training)
    return same


class _Chosen:
    """Which ids of `index` [N, I] fall into a tile."""

    def __init__(self, index: Tensor):
        self._ids, self._order = index.reshape(-1).sort(stable=True)
        self._width = index.shape[1]

    def within(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """(place in the flattened index, position, id - start), each int64 [n], ids ascending."""
        borders = torch.tensor([start, stop], device=self._ids.device)
        first, last = torch.searchsorted(self._ids, borders).tolist()
        places = self._order[first:last]
        return places, places // self._width, self._ids[first:last] - start


class _Answers(torch.autograd.Function):
    """(h [N, H], W [V, H] or None, head, index [N, I], temperatures) -> (partition [N] each, picked [N, I])."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, head: Head, index: Tensor, temperatures: tuple[float, ...]
    ) -> tuple[Tensor, ...]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        along = weight is None and ctx.needs_input_grad[0]
        sums = [_Partition(t, hidden, wide, along) for t in temperatures]
        picked = torch.empty(index.shape, dtype=wide, device=hidden.device)
        chosen = _Chosen(index)
        for start, rows in _tiles(head, weight, hidden):
            logits = _logits(hidden, rows, head.bias, start, wide)
            places, positions, columns = chosen.within(start, start + len(rows))
            picked.view(-1)[places] = logits[positions, columns]
            for number, part in enumerate(sums):
                part.add(logits, rows, last=number == len(sums) - 1)
        partitions = [part.value() for part in sums]
        ctx.head, ctx.temperatures, ctx.along = head, temperatures, along
        slopes = [part.slope() for part in sums] if along else []
        ctx.save_for_backward(hidden, weight, index, *partitions, *slopes)
        return *partitions, picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, weight, index, *kept = ctx.saved_tensors
        partitions, slopes = kept[: len(ctx.temperatures)], kept[len(ctx.temperatures) :]
        *by_partition, by_picked = grads
        chosen = _Chosen(index)
        if ctx.along:
            total = sum(grad[:, None] * slope for grad, slope in zip(by_partition, slopes, strict=True))
            for start, rows in _tiles(ctx.head, weight, hidden):
                _add_rows(total, by_picked, chosen.within(start, start + len(rows)), rows)
            return total.to(hidden.dtype), None, None, None, None
        wide = by_picked.dtype
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start, rows in _tiles(ctx.head, weight, hidden):
            logits = _logits(hidden, rows, ctx.head.bias, start, wide)
            slope = torch.zeros_like(logits)
            for t, grad, partition in zip(ctx.temperatures, by_partition, partitions, strict=True):
                slope += (logits / t - partition[:, None]).exp_().mul_((grad / t)[:, None])
            places, positions, columns = chosen.within(start, start + len(rows))
            slope.index_put_((positions, columns), by_picked.reshape(-1)[places], accumulate=True)
            slope = slope.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden += slope @ rows
            if d_weight is not None:
                torch.mm(slope.T, hidden, out=d_weight[start : start + len(rows)])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None


class _Partition:
    """logsumexp(l / T) [N] and, along with it, its gradient by h [N, H], as tiles come."""

    def __init__(self, temperature: float, hidden: Tensor, wide: torch.dtype, along: bool):
        count, self.temperature = len(hidden), temperature
        self.largest = torch.full((count,), -torch.inf, dtype=wide, device=hidden.device)
        self.mass = torch.zeros(count, dtype=wide, device=hidden.device)
        self.pull = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if along else None

    def add(self, logits: Tensor, rows: Tensor, last: bool) -> None:
        """Take in a tile's logits [N, n], which may be written over where nobody else needs them (`last`)."""
        scaled = logits / self.temperature if self.temperature != 1.0 or not last else logits
        largest = torch.maximum(self.largest, scaled.amax(1))
        shares = scaled.sub_(largest[:, None]).exp_()
        fading = (self.largest - largest).exp_()
        self.mass = self.mass * fading + shares.sum(1)
        if self.pull is not None:
            self.pull.mul_(fading[:, None]).add_(shares.to(rows.dtype) @ rows)
        self.largest = largest

    def value(self) -> Tensor:
        """The logsumexp."""
        return self.largest + self.mass.log()

    def slope(self) -> Tensor:
        """Its gradient by h."""
        assert self.pull is not None
        return self.pull / (self.mass * self.temperature)[:, None]


def _tiles(head: Head, weight: Tensor | None, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, H] in the type of the states) of the head, piece by piece."""
    least, most = ROWS
    size = min(max(TILE // len(hidden), least), most) // least * least
    for start in range(0, head.vocabulary, size):
        stop = min(start + size, head.vocabulary)
        rows = head.rows(start, stop) if weight is None else weight[start:stop]
        yield start, rows.detach().to(hidden.dtype)


def _logits(hidden: Tensor, rows: Tensor, bias: Tensor | None, start: int, wide: torch.dtype) -> Tensor:
    """[N, n] of a tile, a tensor of their own."""
    logits = (hidden @ rows.T).to(wide)
    return logits if bias is None else logits.add_(bias[start : start + len(rows)].detach().to(wide))


def _add_rows(total: Tensor, by_picked: Tensor, chosen: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> None:
    """Add what chosen logits pull their positions' states by: gradient times row of the head."""
    slopes = by_picked.reshape(-1)
    for places, positions, columns in zip(*(part.split(PAIRS) for part in chosen), strict=True):
        total.index_add_(0, positions, rows[columns].to(total.dtype) * slopes[places, None])
