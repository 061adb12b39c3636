"""The product of a linear whose indices and tables stand still: y = a ⊙ Q (b ⊙ x), Q = LUT[idx].

With Ŵ = Q ⊙ (a bᵀ) formed, scales want dL/dŴ, one product of three. As vectors around one product they want none: for
an upstream gradient G and t = Qᵀ (a ⊙ G),

    dL/da = Σ_positions G ⊙ (y / a),   dL/db = Σ_positions x ⊙ t,   dL/dx = b ⊙ t.

Q is looked up again in the backward pass: nothing of a weight's size outlives either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from a1q.quant.grid import lookup


def scaled_product(x: Tensor, table: Tensor, places: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y [..., out], differentiable by x [..., in], a [out] and b [in].

    Products are made in the type that autocast says, or that of x; sums over positions in float32 or wider.

    Args:
        table: [1, n], which stands still.
        places: uint8 [out, in].
    """
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _ScaledProduct.apply(x, table, places, a, b, kind)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, places: Tensor, a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
        product = linear((x * b).to(kind), lookup(table.to(kind), places))
        ctx.save_for_backward(x, product if ctx.needs_input_grad[3] else None, table, places, a, b)
        ctx.kind = kind
        return (product * a).to(kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, product, table, places, a, b = ctx.saved_tensors
        x_wanted, _, _, a_wanted, b_wanted, _ = ctx.needs_input_grad
        d_x = d_a = d_b = None
        with torch.autocast(grad.device.type, enabled=False):
            if a_wanted:
                d_a = _sum_of_products(grad, product, a)
            if x_wanted or b_wanted:
                back = (grad * a).to(ctx.kind) @ lookup(table.to(ctx.kind), places)
                if b_wanted:
                    d_b = _sum_of_products(back, x, b)
                if x_wanted:
                    d_x = (back * b).to(x.dtype)
        return d_x, None, None, d_a, d_b, None


def _sum_of_products(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Σ left ⊙ right over all but the last dimension, [n], in the type of `like`."""
    return (left.to(like.dtype) * right).flatten(0, -2).sum(0)
