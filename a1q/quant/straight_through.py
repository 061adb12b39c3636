"""The quantized weight as one differentiable function with hand-written gradients.

    Ŵ = q ⊙ S,   q = LUT[idx],   S = A diag(g) B      (S absent: Ŵ = q)

With a latent weight V, idx is the entry nearest to V / S. For an upstream gradient G = dL/dŴ:

    dL/dV   = G                     straight through the assignment
    dL/dLUT = Σ of G ⊙ S over the places that use the entry
    dL/dA   = (G ⊙ q) (diag(g) B)ᵀ, dL/dB = (A diag(g))ᵀ (G ⊙ q), dL/dg = columns of A ⊙ ((G ⊙ q) Bᵀ), summed

The gradient by S is G ⊙ q, the true derivative at constant indices. Learned step sizes (LSQ) use G ⊙ (q - V / S)
instead, which vanishes where latents sit on the grid, and Adam then turns rounding noise into steps; q holds on
the grid and off it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from a1q.quant.grid import lookup, nearest, round_fp16, safe_scale, sums_per_entry

Assign = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(weight [out, in], table [n, L], scale [out, in] or None, gain [out] or None) -> places in the table, uint8."""


def scale_of(a: Tensor, g: Tensor | None, b: Tensor) -> Tensor:
    """S = A diag(g) B [out, in] from a [out, r], g [r] or None for ones, b [r, in]."""
    weighted = a if g is None else a * g
    return weighted * b if b.shape[0] == 1 else weighted @ b


def fold(a: Tensor, g: Tensor | None, b: Tensor) -> tuple[Tensor, Tensor]:
    """(A sign(g) √|g|, √|g| B): the two factors of S that are stored in fp16; balanced, so both round well."""
    if g is None:
        return a, b
    root = g.abs().sqrt()
    return a * (root * g.sign()), root[:, None] * b


def assign(weight: Tensor, lut: Tensor, scale: Tensor | None, gain: Tensor | None) -> Tensor:
    """Indices uint8 [out, in] of the entries of `lut` [n, L] nearest to gain ⊙ W / S, gain [out]; S may be negative."""
    values = weight if scale is None else weight / safe_scale(scale)
    return nearest(values if gain is None else values * gain[:, None], lut)


def grid_weight(
    indices: Tensor,
    latent: Tensor | None,
    lut: Tensor,
    factors: tuple[Tensor, Tensor, Tensor] | None,
    fp16: bool,
    gain: Tensor | None = None,
    rule: Assign = assign,
) -> Tensor:
    """Ŵ [out, in]; `lut` is [n, L], `factors` is (a [out, r], g [r], b [r, in]) or None.

    With `latent` [out, in] the indices are derived from it times `gain` [out] (1 where None) by `rule`, else `indices`
    stand. With `fp16` the LUT and the folded factors A√g and √gB are rounded to fp16 first, with the identity as
    gradient.
    """
    a, g, b = factors if factors is not None else (None, None, None)
    return _GridWeight.apply(indices, latent, lut, a, g, b, fp16, gain, rule)


def rounded_through(tensor: Tensor) -> Tensor:
    """`tensor` rounded to fp16, with the identity as gradient."""
    return _RoundThrough.apply(tensor)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return round_fp16(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _GridWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, latent: Any, lut: Tensor, a: Any, g: Any, b: Any, fp16: bool, gain: Any, rule: Assign
    ) -> Tensor:
        with torch.autocast(lut.device.type, enabled=False):
            seen_lut, scale = _as_seen(lut, a, g, b, fp16)
            if latent is not None:
                indices = rule(latent, seen_lut, scale, gain)
            ctx.save_for_backward(indices, lut, a, g, b)
            ctx.fp16 = fp16
            entries = lookup(seen_lut, indices)
            return entries if scale is None else entries.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, lut, a, g, b = ctx.saved_tensors
        _, latent_wanted, lut_wanted, a_wanted, g_wanted, b_wanted, *_ = ctx.needs_input_grad
        d_lut = d_a = d_g = d_b = None
        with torch.autocast(lut.device.type, enabled=False):
            # Entries and scale are formed again: cheaper than keeping 8 bytes per weight alive.
            seen_lut, scale = _as_seen(lut, a, g, b, ctx.fp16)
            if lut_wanted:
                d_lut = sums_per_entry(indices, grad if scale is None else grad * scale, lut)
            if a_wanted or g_wanted or b_wanted:
                d_scale = lookup(seen_lut, indices).mul_(grad)
                if a_wanted or g_wanted:
                    d_ag = d_scale @ b.T
                    d_a, d_g = d_ag * g, (d_ag * a).sum(0)
                if b_wanted:
                    d_b = (a * g).T @ d_scale
        return None, grad if latent_wanted else None, d_lut, d_a, d_g, d_b, None, None, None


def _as_seen(lut: Tensor, a: Any, g: Any, b: Any, fp16: bool) -> tuple[Tensor, Tensor | None]:
    """LUT and S as the forward pass uses them."""
    if fp16:
        lut = round_fp16(lut)
    if a is None:
        return lut, None
    if fp16:
        left, right = fold(a, g, b)
        return lut, scale_of(round_fp16(left), None, round_fp16(right))
    return lut, scale_of(a, g, b)
