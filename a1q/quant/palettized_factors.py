"""Factors A and B that are palettes themselves: each rank's column of A and row of B has a table of its own.

Beside `a` [out, r] and `b` [r, in] stand `a_lut` and `b_lut` [r, n]; what counts is the entry nearest to each number,
so that `a` and `b` train as latents do. Snapped parts are `a_indices` uint8 [out, r], `b_indices` uint8 [r, in] and the
tables in fp16, magnitudes multiplied into them: one table per rank holds A√g as exactly as it holds A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from a1q.quant.grid import lookup, nearest, snap_lut, sums_per_entry
from a1q.quant.kmeans import lloyd, quantile_start
from a1q.quant.straight_through import fold

TABLES = ("a_lut", "b_lut")
ROUNDS = 30
"""Of Lloyd's iteration, at most."""


def with_tables(parts: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The parts with tables of 2**bits entries per rank, of least squared error to `a` and `b`; other ones go."""
    factors = {"a_lut": parts["a"].T.contiguous(), "b_lut": parts["b"]}
    return {**parts, **{name: _table(factor, 2**bits) for name, factor in factors.items()}}


def looked_up(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts whose `a` and `b` are the numbers that count, without tables; `parts` as they are where there are none.

    Differentiable: the gradient of a factor is that of its number, the one of a table the sum over an entry's uses.
    """
    if "a_lut" not in parts:
        return dict(parts)
    a_lut, b_lut = parts["a_lut"], parts["b_lut"]
    if "a_indices" in parts:
        a = lookup(a_lut, parts["a_indices"].T.contiguous()).T.contiguous()
        b = lookup(b_lut, parts["b_indices"])
    else:
        a = _Nearest.apply(parts["a"].T.contiguous(), a_lut).T.contiguous()
        b = _Nearest.apply(parts["b"], b_lut)
    gone = {"a_indices", "b_indices", *TABLES}
    return {**{name: part for name, part in parts.items() if name not in gone}, "a": a, "b": b}


def snapped(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Indices and fp16 tables, ascending, on the CPU; `g` is multiplied into the tables."""
    left, right = fold(parts["a_lut"].T, parts.get("g"), parts["b_lut"])
    if "a_indices" in parts:
        a_indices, b_indices = parts["a_indices"].T, parts["b_indices"]
    else:
        a_indices = nearest(parts["a"].T.contiguous(), parts["a_lut"])
        b_indices = nearest(parts["b"], parts["b_lut"])
    a_indices, a_lut = snap_lut(a_indices.contiguous(), left.T.contiguous())
    b_indices, b_lut = snap_lut(b_indices, right)
    return {"a_indices": a_indices.T.contiguous(), "b_indices": b_indices, "a_lut": a_lut, "b_lut": b_lut}


def _table(factor: Tensor, entries: int) -> Tensor:
    """[r, entries] for the rows of `factor` [r, n]."""
    return lloyd(factor, torch.ones_like(factor), quantile_start(factor, entries), ROUNDS)


class _Nearest(torch.autograd.Function):
    """Entries of `lut` [r, n] nearest to `values` [r, m]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lut: Tensor) -> Tensor:
        indices = nearest(values.detach(), lut.detach())
        ctx.save_for_backward(indices, lut)
        return lookup(lut.detach(), indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        indices, lut = ctx.saved_tensors
        wanted, lut_wanted = ctx.needs_input_grad
        return grad if wanted else None, sums_per_entry(indices, grad.contiguous(), lut) if lut_wanted else None
