"""The product of a linear whose weight is a table's entries between two vectors: y = a ⊙ Q (b ⊙ x), Q = T[places].

With Ŵ = Q ⊙ (a bᵀ) formed, everything wants dL/dŴ. As vectors around one product, scales want no matrix at all: for an
upstream gradient G [positions, out] and t = (a ⊙ G) Q,

    dL/da = Σ_positions G ⊙ (Q (b ⊙ x)),   dL/db = Σ_positions x ⊙ t,   dL/dx = b ⊙ t.

Only a table that trains and a latent weight V do, D = Gᵀ x:

    dL/dV = D (straight through the assignment),   dL/dT = Σ of D ⊙ (a bᵀ) over the places that use an entry.

Q is looked up again in the backward pass: nothing of a weight's size outlives either, but for the places that a latent
weight means, a byte each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from a1q.quant.grid import BLOCK, lookup, sums_per_entry
from a1q.quant.workspace import workspace

Rule = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(V [out, in], table [1, n], S [out, in], gain [out] or None) -> places uint8 [out, in]"""

ROWS = 16
POSITIONS = 64
"""That are worked on at a time."""


def table_product(
    x: Tensor,
    table: Tensor,
    places: Tensor,
    a: Tensor,
    b: Tensor,
    latent: Tensor | None = None,
    gain: Tensor | None = None,
    rule: Rule | None = None,
) -> Tensor:
    """y [..., out], differentiable by x [..., in], table [1, n], a [out], b [in] and the latent weight.

    Products are made in the type that autocast says, or that of x; sums over positions in float32 or wider.

    Args:
        places: uint8 [out, in]; with a latent not looked at.
        latent: V [out, in], which decides the places by `rule`, with `gain`.
    """
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        if latent is not None:
            assert rule is not None
            with torch.no_grad():
                places = _places(latent, table, a, b, gain, rule)
        return _TableProduct.apply(x, table, places, a, b, latent, kind)


def _places(latent: Tensor, table: Tensor, a: Tensor, b: Tensor, gain: Tensor | None, rule: Rule) -> Tensor:
    """Places uint8 [out, in] that a latent weight means, by blocks of rows."""
    places = torch.empty(latent.shape, dtype=torch.uint8, device=latent.device)
    for rows in _row_blocks(latent.shape):
        places[rows] = rule(latent[rows], table, a[rows, None] * b, None if gain is None else gain[rows])
    return places


def _row_blocks(shape: torch.Size) -> Iterator[slice]:
    """Rows of a matrix by about `BLOCK` elements; a multiple of what vectors along rows may span."""
    step = max(BLOCK // shape[1] // ROWS * ROWS, ROWS)
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


class _TableProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, table: Tensor, places: Tensor, a: Tensor, b: Tensor, latent: Any, kind: torch.dtype
    ) -> Tensor:
        product = linear(_scaled(x, b, kind), _entries(table, places, kind))
        # y is kept alive by what follows in most models, and tells the product wherever a is not zero. Asking that of
        # another device would make this one wait for it.
        a_wanted = ctx.needs_input_grad[3]
        looks = a_wanted and x.device.type == "cpu" and not torch.compiler.is_compiling()
        ctx.by_result = looks and product.dtype == a.dtype and bool((a != 0).all())
        kept = None
        if a_wanted and not ctx.by_result:
            kept, y = product, (product * a).to(kind)
        else:
            y = product.mul_(a)
            kept = y if a_wanted else None
        ctx.save_for_backward(x, kept, table, places, a, b)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, table, places, a, b = ctx.saved_tensors
        x_wanted, table_wanted, _, a_wanted, b_wanted, latent_wanted, _ = ctx.needs_input_grad
        d_x = d_table = d_a = d_b = d_latent = None
        with torch.autocast(grad.device.type, enabled=False):
            if a_wanted:
                d_a = _sum_of_products(grad, kept, a)
                if ctx.by_result:
                    d_a /= a
            if x_wanted or b_wanted:
                back = _scaled(grad, a, ctx.kind) @ _entries(table, places, ctx.kind)
                if b_wanted:
                    d_b = _sum_of_products(back, x, b)
                if x_wanted:
                    d_x = back.mul_(b).to(x.dtype)
            if latent_wanted:
                d_latent = _over_positions(grad.to(ctx.kind), x.to(ctx.kind)).to(a.dtype)
                if table_wanted:
                    d_table = torch.zeros_like(table)
                    for rows in _row_blocks(places.shape):
                        scaled = (d_latent[rows] * a[rows, None]).mul_(b)
                        d_table += sums_per_entry(places[rows], scaled, table)
            elif table_wanted:
                scaled = _over_positions((grad * a).to(ctx.kind), (x * b).to(ctx.kind))
                d_table = sums_per_entry(places, scaled.to(table.dtype), table)
        return d_x, d_table, None, d_a, d_b, d_latent, None


def _entries(table: Tensor, places: Tensor, kind: torch.dtype) -> Tensor:
    """Q [out, in], for now."""
    out = workspace("entries", places.shape, kind, places.device)
    return lookup(table.detach().to(kind), places, out)


def _scaled(vectors: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """vectors ⊙ scale, for now."""
    out = workspace("vectors", vectors.shape, kind, vectors.device)
    return torch.mul(vectors, scale, out=out)


def _sum_of_products(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Σ left ⊙ right over all but the last dimension, [n], in the type of `like`."""
    left, right = left.flatten(0, -2).to(like.dtype), right.flatten(0, -2)
    if left.device.type != "cpu" or len(left) <= POSITIONS or torch.compiler.is_compiling():
        return (left * right).sum(0)
    # what is summed stays in the cache
    whole = len(left) - len(left) % POSITIONS
    total = left[:POSITIONS] * right[:POSITIONS]
    for start in range(POSITIONS, whole, POSITIONS):
        total.addcmul_(left[start : start + POSITIONS], right[start : start + POSITIONS])
    total[: len(left) - whole].addcmul_(left[whole:], right[whole:])
    return total.sum(0)


def _over_positions(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right [m, n] of [..., m] and [..., n]."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)
