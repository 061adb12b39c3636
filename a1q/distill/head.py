"""What a loss asks of a head, without the [tokens, vocabulary] tensor: logsumexps, and the logits of chosen ids.

The vocabulary is walked in tiles of a few thousand rows of the head W [V, H]. With h a position's state, l = h Wᵀ:

* The partition  P = logsumexp(l / T)  is summed as tiles come, relative to the largest so far (Milakov and Gimelshein,
  2018). Its gradient by h is  Σ_v softmax(l / T)_v W_v / T,  a sum over the same tiles: where the head stands still it
  is taken along in the forward pass (as attention's output is, Dao et al., 2022), and nothing is computed twice.
* A head that trains needs  dL/dW_v = Σ_positions (dL/dl_v) h,  which wants P beforehand: logits are computed again,
  tile by tile, in the backward pass. That is one product more, of four.
* Beside a teacher that runs along, the gradient of KL(p || q) by l_v is (q_v - p_v) / T. Both partitions have to be
  known for the two to be subtracted before anything is rounded, so its tiles, too, are computed again.

Rows of a quantized head are made tile by tile, in each pass, and the whole weight never is, unless it has a latent: a
tile's dL/dW goes on to the parts that train, and is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from a1q.distill.tiles import Guide, Partition, spans, tile_logits, tiles
from a1q.quant.module import QuantModule
from a1q.quant.tied import TiedHead

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
        *partitions, picked = self._ask(hidden, index, temperatures, None)
        places = index.shape[:-1]
        return tuple(part.reshape(places) for part in partitions), picked.reshape(index.shape)

    def beside(
        self, hidden: Tensor, index: Tensor, temperatures: Sequence[float], teacher: Head, taught: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """`partitions_and_picked` with, picked first, the student's logit of the teacher's most probable token, and
        the gap [B, L] (`a1q.distill.exact`) to the teacher at the first of the temperatures.

        Args:
            teacher: its head, which gets no gradient.
            taught: its states [B, L, H'].
        """
        kind = _type_of_products(taught)
        guide = Guide(teacher, taught.detach().reshape(-1, taught.shape[-1]).to(kind), temperatures[0])
        *partitions, picked, gap = self._ask(hidden, index, temperatures, guide)
        places = index.shape[:-1]
        return tuple(part.reshape(places) for part in partitions), picked.reshape(*places, -1), gap.reshape(places)

    def _ask(
        self, hidden: Tensor, index: Tensor, temperatures: Sequence[float], guide: Guide | None
    ) -> tuple[Tensor, ...]:
        parts = self._source.trained_parts() if self.trains and isinstance(self._source, QuantModule) else {}
        weight = self.weight() if self.trains and not parts else None
        kind = _type_of_products(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return _Answers.apply(
                hidden.reshape(-1, hidden.shape[-1]).to(kind),
                None if weight is None else weight.to(kind),
                self,
                index.reshape(-1, index.shape[-1]),
                tuple(temperatures),
                guide,
                tuple(parts),
                *parts.values(),
            )

    def rows_of(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
        """`rows` of a quantized head, differentiable by the given parts."""
        assert isinstance(self._source, QuantModule)
        return self._source.rows_of(parts, start, stop)


class HeadFinder:
    """The head of a model; adapters come and go, so it is looked at every time it is asked for."""

    def __init__(self, model: Any):
        self._model = model
        self._known: tuple[Any, Head | None] | None = None

    def __call__(self) -> Head | None:
        """As `head_of`."""
        module = self._model.get_output_embeddings()
        key = module, getattr(module, "lora_A", None) is None
        if self._known is None or self._known[0] != key:
            self._known = key, head_of(self._model)
        return self._known[1]


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


def _type_of_products(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


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
    """(h [N, H], W [V, H] or None, head, index [N, I], temperatures, guide, names of parts, parts) ->
    (partition [N] each, picked [N, I]); with a guide picked is [N, 1 + I], its top-1 first, and the gap [N] is last.

    A head that trains gives W, or its parts."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        head: Head,
        index: Tensor,
        temperatures: tuple[float, ...],
        guide: Guide | None,
        names: tuple[str, ...],
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        along = weight is None and not parts and ctx.needs_input_grad[0] and guide is None
        sums = [Partition(len(hidden), wide, hidden.device) for _ in temperatures]
        pulls = [torch.zeros(hidden.shape, dtype=wide, device=hidden.device) for _ in temperatures if along]
        picked = torch.empty(index.shape, dtype=wide, device=hidden.device)
        chosen = _Chosen(index)
        if guide is not None:
            guide.begin(wide)
        for start, rows in tiles(head, weight, hidden):
            logits = tile_logits(hidden, rows, head.bias, start, wide)
            places, positions, columns = chosen.within(start, start + len(rows))
            picked.view(-1)[places] = logits[positions, columns]
            if guide is not None:
                guide.add(start, logits)
            for number, (t, part) in enumerate(zip(temperatures, sums, strict=True)):
                last = number == len(sums) - 1  # nobody else needs the logits: they may be written over
                shares, fading = part.add(logits / t if t != 1.0 or not last else logits)
                if along:
                    pulls[number].mul_(fading[:, None]).add_(shares.to(rows.dtype) @ rows)
        partitions = [part.value() for part in sums]
        ctx.head, ctx.temperatures, ctx.along, ctx.guide = head, temperatures, along, guide
        found = [*partitions, picked]
        if guide is not None:
            label, gap = guide.end()
            index = torch.cat([guide.top1[:, None], index], dim=1)
            found = [*partitions, torch.cat([label[:, None], picked], dim=1), gap]
        slopes = [
            pull / (part.mass * t)[:, None] for pull, part, t in zip(pulls, sums, temperatures, strict=False)
        ]  # of the partitions by h; none unless taken along
        ctx.names = names
        ctx.save_for_backward(hidden, weight, index, *parts, *partitions, *slopes)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, weight, index, *kept = ctx.saved_tensors
        parts, kept = kept[: len(ctx.names)], kept[len(ctx.names) :]
        count = len(ctx.temperatures)
        partitions, slopes = kept[:count], kept[count:]
        by_partition, (by_picked, *by_gap) = grads[:count], grads[count:]
        chosen = _Chosen(index)
        nothing = (None,) * 5
        if ctx.along:
            total = sum(grad[:, None] * slope for grad, slope in zip(by_partition, slopes, strict=True))
            for start, rows in tiles(ctx.head, weight, hidden):
                _add_rows(total, by_picked, chosen.within(start, start + len(rows)), rows)
            return total.to(hidden.dtype), None, *nothing, *(None for _ in parts)
        wide = by_picked.dtype
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_parts: list[Tensor | None] = [None] * len(parts)
        for start, rows, graph in _with_graphs(ctx.head, weight, hidden, dict(zip(ctx.names, parts, strict=True))):
            stop = start + len(rows)
            logits = tile_logits(hidden, rows, ctx.head.bias, start, wide)
            slope = torch.zeros_like(logits)
            for t, grad, partition in zip(ctx.temperatures, by_partition, partitions, strict=True):
                slope += (logits / t - partition[:, None]).exp_().mul_((grad / t)[:, None])
            for grad in by_gap:
                slope -= ctx.guide.probabilities(start, stop).mul_((grad / ctx.temperatures[0])[:, None])
            places, positions, columns = chosen.within(start, stop)
            slope.index_put_((positions, columns), by_picked.reshape(-1)[places], accumulate=True)
            slope = slope.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden += slope @ rows
            if d_weight is not None:
                torch.mm(slope.T, hidden, out=d_weight[start:stop])
            if graph is not None:
                found = zip(d_parts, graph(slope.T @ hidden), strict=True)
                d_parts = [new if total is None or new is None else total.add_(new) for total, new in found]
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, *nothing, *d_parts


def _with_graphs(
    head: Head, weight: Tensor | None, hidden: Tensor, parts: Mapping[str, Tensor]
) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Sequence[Tensor | None]] | None]]:
    """`tiles`, and for a head given by its parts what makes of a tile's dL/dW the gradients by these."""
    if not parts:
        yield from ((start, rows, None) for start, rows in tiles(head, weight, hidden))
        return
    for start, stop in spans(head, hidden):
        with torch.enable_grad():
            leaves = {name: part.detach().requires_grad_() for name, part in parts.items()}
            rows = head.rows_of(leaves, start, stop)

        def by_parts(gradient: Tensor, rows: Tensor = rows, leaves: Mapping[str, Tensor] = leaves) -> Any:
            return torch.autograd.grad(rows, list(leaves.values()), gradient.to(rows.dtype), allow_unused=True)

        yield start, rows.detach().to(hidden.dtype), by_parts


def _add_rows(total: Tensor, by_picked: Tensor, chosen: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> None:
    """Add what chosen logits pull their positions' states by: gradient times row of the head."""
    slopes = by_picked.reshape(-1)
    for places, positions, columns in zip(*(part.split(PAIRS) for part in chosen), strict=True):
        total.index_add_(0, positions, rows[columns].to(total.dtype) * slopes[places, None])
