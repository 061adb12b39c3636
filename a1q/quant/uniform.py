"""Evenly spaced grids: Ŵ = s (q - z) with codes q = 0 … top, a scale s and a zero point z per block.

Scales are [out, groups]; a block is in / groups consecutive inputs of a row. Zero points are [out, groups] or a number,
and need not be whole: levels without a zero have z half-way between two codes. For an upstream gradient G = dL/dŴ and
a latent V, with rounding taken as the identity and clamping as what it is:

    dL/dV = G where V is inside the grid, else 0
    dL/ds = sum over the block of G (q - z - V / s) inside, G (q - z) outside

Inside is where V rounds to a level without being clamped, up to half a step beyond the outermost ones. Without a latent
the codes are constants and dL/ds is the sum of G (q - z).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from a1q.quant.grid import round_fp16, safe_scale

Zero = Tensor | float
COARSE = tuple(1.12**-step for step in range(1, 42))
"""From the largest weights on the outermost levels down to a hundredth of that: tensors may have far outliers."""
FINE = tuple(1 + step / 200 for step in range(-12, 13) if step)
NEAR = (0.8, 0.9, 1.1, 1.25)
"""Around the scale of the neighbouring zero point."""
ROUNDS = 10


def blocked(tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor` [out, in] as [out, groups, in / groups], for `scale` [out, groups]."""
    return tensor.reshape(*scale.shape, -1)


def round_to_codes(weight: Tensor, scale: Tensor, zero: Zero, top: int) -> Tensor:
    """Codes uint8 [out, in] of the levels nearest to `weight`; a value midway takes the smaller code."""
    return _codes(blocked(weight, scale), scale, zero, top).to(torch.uint8).reshape(weight.shape)


def level_values(codes: Tensor, scale: Tensor, zero: Zero) -> Tensor:
    """s (q - z) [out, in] in the type of `scale`."""
    return ((blocked(codes, scale).to(scale.dtype) - _per_block(zero)) * scale[..., None]).reshape(codes.shape)


def uniform_weight(value: Tensor, codes: Tensor, latent: Tensor | None, scale: Tensor, zero: Zero, top: int) -> Tensor:
    """`value` [out, in], the levels that `codes` name, with the gradients above by `scale` and `latent`."""
    return _UniformWeight.apply(value, codes, latent, scale, zero, top)


class _UniformWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, codes: Tensor, latent: Any, scale: Tensor, zero: Zero, top: int) -> Tensor:
        ctx.save_for_backward(codes, latent, scale)
        ctx.zero, ctx.top = zero, top
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, latent, scale = ctx.saved_tensors
        zero = _per_block(ctx.zero)
        d_latent = d_scale = None
        share = blocked(codes, scale).to(scale.dtype) - zero
        if latent is not None:
            position = blocked(latent, scale) / safe_scale(scale)[..., None]
            inside = (position >= -0.5 - zero) & (position <= ctx.top + 0.5 - zero)
            if ctx.needs_input_grad[2]:
                d_latent = grad * inside.reshape(grad.shape)
            share = share - position.where(inside, 0.0)
        if ctx.needs_input_grad[3]:
            d_scale = (blocked(grad, scale) * share).sum(-1)
        return None, None, d_latent, d_scale, None, None


def search_scale(weight: Tensor, importance: Tensor, start: Tensor, zero: Zero, top: int) -> Tensor:
    """The scale [out, groups] of least Σ h (W - Ŵ)², searched from a little above `start` to a hundredth of it.

    The error is a smooth trend with many small dents, one per weight that changes its code: hence a wide grid, a fine
    one, and then steps to the least squares scale at fixed codes, which never raise the error.

    Args:
        weight: [out, in].
        importance: h [in], or [out, in].
        start: [out, groups]; with it the outermost levels reach the largest weights.
        zero: zero points, whole or not.
        top: the largest code.
    """
    coarse = refine_scale(weight, importance, start, zero, top, COARSE, 0)
    return refine_scale(weight, importance, coarse, zero, top, FINE, ROUNDS)


def refine_scale(
    weight: Tensor, importance: Tensor, start: Tensor, zero: Zero, top: int, ratios: Iterable[float], rounds: int
) -> Tensor:
    """The best of `start` times each ratio, then at most `rounds` least squares steps. Arguments: `search_scale`."""
    values, h = blocked(weight, start), blocked(importance.expand_as(weight), start)
    best, least = start, _error(values, h, start, zero, top)
    for ratio in ratios:
        best, least = _better(values, h, start * ratio, zero, top, best, least)
    for _ in range(rounds):
        levels = _codes(values, best, zero, top) - _per_block(zero)
        size = (h * levels.square()).sum(-1)
        fitted = (h * levels * values).sum(-1) / size.clamp_min(torch.finfo(size.dtype).tiny)
        before = least
        best, least = _better(values, h, fitted.where(fitted > 0, best), zero, top, best, least)
        if torch.equal(before, least):
            break
    return best


def search_scale_and_zero(
    weight: Tensor, importance: Tensor, low: Tensor, high: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """(scale, whole zero point) [out, groups] each, of little Σ h (W - Ŵ)², for weights between `low` and `high`.

    Searched from the zero point of that range and from the middle one, as a single outlier moves the first far off;
    then zero points move by one as long as the error falls.
    """
    scale, zero = range_scale(low, high, top)
    scale = search_scale(weight, importance, scale, zero, top)
    middle = torch.full_like(zero, (top + 1) // 2)
    other = search_scale(weight, importance, torch.maximum(-low, high) / (top // 2), middle, top)
    values, h = blocked(weight, scale), blocked(importance.expand_as(weight), scale)
    least, error = _error(values, h, scale, zero, top), _error(values, h, other, middle, top)
    scale, zero = other.where(error < least, scale), middle.where(error < least, zero)
    least = torch.minimum(error, least)
    for step in (1, -1):
        for _ in range(top):
            moved = (zero + step).clamp(0, top)
            other = refine_scale(weight, importance, scale, moved, top, NEAR, 2)
            error = _error(values, h, other, moved, top)
            better = error < least
            if not bool(better.any()):
                break
            scale, zero = other.where(better, scale), moved.where(better, zero)
            least = torch.minimum(error, least)
    return scale, zero


def range_scale(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale, whole zero point) with which codes 0 … top just hold `low` <= 0 to `high` >= 0."""
    scale = (high - low) / top
    return scale, torch.where(scale > 0, -low / scale, 0.0).round().clamp(0, top)


def round_through(tensor: Tensor) -> Tensor:
    """`tensor` rounded to fp16 with the identity as gradient."""
    return tensor + (round_fp16(tensor) - tensor).detach()


def _better(
    values: Tensor, h: Tensor, scale: Tensor, zero: Zero, top: int, best: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    """Block by block the better of `scale` and `best`, and its error."""
    error = _error(values, h, scale, zero, top)
    return torch.where(error < least, scale, best), torch.minimum(error, least)


def _error(values: Tensor, h: Tensor, scale: Tensor, zero: Zero, top: int) -> Tensor:
    levels = _codes(values, scale, zero, top).sub_(_per_block(zero)).mul_(scale[..., None])
    return levels.sub_(values).square_().mul_(h).sum(-1)


def _codes(values: Tensor, scale: Tensor, zero: Zero, top: int) -> Tensor:
    """Codes [out, groups, block] in the type of `values`."""
    return (values / safe_scale(scale)[..., None]).add_(_per_block(zero) - 0.5).ceil_().clamp_(0, top)


def _per_block(zero: Any) -> Any:
    """`zero` so that it broadcasts over [out, groups, block]."""
    return zero[..., None] if isinstance(zero, Tensor) else zero
