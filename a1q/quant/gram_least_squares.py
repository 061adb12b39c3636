"""Least squares of a grid's numbers under  Σ_i r_i (w_i - ŵ_i)ᵀ H (w_i - ŵ_i),  H = E[x xᵀ], with codes held.

Each function fits one factor of Ŵ with the others held, starting where it stood, by conjugate gradients: a step costs
one product with H, and no step raises the error. Preconditioned by what the normal equations would be if H were
diagonal, they are all but solved after a few, because codes of different columns have hardly anything in common.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from a1q.quant.grid import lookup, sums_per_entry
from a1q.quant.lowrank import cholesky_factors, normal_matrices

STEPS = 3
"""Conjugate-gradient steps, at most. They start from the solution of the sweep before, so that few are enough."""
ENOUGH = 1e-12
"""It ends once the squared residual has fallen by this."""


def solve_rows(weight: Tensor, entries: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A [out, r] for Ŵ = Q ⊙ (A B); at rank 1, what would turn <= 0 stays where it stood.

    Args:
        weight: [out, in].
        entries: Q = LUT[codes] [out, in].
        h: H [in, in], in the type of `weight`.
        a: [out, r], where it stood.
        b: [r, in].
    """
    inverse = _inverses(normal_matrices(entries.square() * h.diagonal(), b))

    def back(product: Tensor) -> Tensor:
        return (product * entries) @ b.T

    def forth(x: Tensor) -> Tensor:
        return entries * (x @ b)

    residual = back((weight - forth(a)) @ h)
    solved = conjugate_gradients(lambda x: back(forth(x) @ h), residual, a, lambda x: _times(inverse, x), separate=True)
    return torch.where(solved > 0, solved, a) if a.shape[1] == 1 else solved


def solve_columns(weight: Tensor, entries: Tensor, h: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    """B [r, in] for Ŵ = Q ⊙ (A B); at rank 1, what would turn <= 0 stays where it stood.

    Args:
        weight: [out, in].
        entries: Q = LUT[codes] [out, in].
        h: H [in, in], in the type of `weight`.
        a: [out, r].
        b: [r, in], where it stood.
        rows: r [out].
    """
    inverse = _inverses(normal_matrices(entries.square().T * h.diagonal()[:, None], a.T * rows.sqrt()))
    left = a * rows[:, None]

    def back(product: Tensor) -> Tensor:
        return left.T @ (product * entries)

    def forth(x: Tensor) -> Tensor:
        return entries * (a @ x)

    residual = back((weight - forth(b)) @ h)
    solved = conjugate_gradients(lambda x: back(forth(x) @ h), residual, b, lambda x: _times(inverse, x.T).T)
    return torch.where(solved > 0, solved, b) if len(b) == 1 else solved


def solve_tables(
    weight: Tensor, codes: Tensor, scale: Tensor | None, h: Tensor, lut: Tensor, rows: Tensor | None = None
) -> Tensor:
    """LUT [n, L] for Ŵ = LUT[codes] ⊙ S, table t for the t-th part of the rows; S [out, in] or None for ones."""
    each = weight.new_ones(len(weight)) if rows is None else rows
    size = each[:, None].expand_as(weight) if scale is None else scale * each[:, None]
    square = size if scale is None else size * scale
    diagonal = sums_per_entry(codes, square * h.diagonal(), lut)

    def back(product: Tensor) -> Tensor:
        return sums_per_entry(codes, product * size, lut)

    def forth(x: Tensor) -> Tensor:
        return lookup(x, codes) if scale is None else lookup(x, codes) * scale

    residual = back((weight - forth(lut)) @ h)
    return conjugate_gradients(
        lambda x: back(forth(x) @ h), residual, lut, lambda x: _divided(x, diagonal), separate=True
    )


def solve_scales(weight: Tensor, levels: Tensor, h: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """s [out, groups], or [1, 1] for all of them, for Ŵ = s · levels; a scale of zero stays.

    A row, or the tensor, where any scale would turn <= 0 stays as it stood.

    Args:
        weight: [out, in].
        levels: [out, in], codes less zero points.
        h: H [in, in], in the type of `weight`.
        scale: where it stood; a group is in / groups consecutive inputs.
        rows: r [out].
    """
    groups = scale.shape[1]

    def gather(product: Tensor) -> Tensor:
        sums = (product * levels).reshape(len(levels), groups, -1).sum(-1) * rows[:, None]
        return sums.reshape(len(scale), -1, groups).sum(1) * (scale > 0)

    def forth(x: Tensor) -> Tensor:
        return (levels.reshape(len(levels), groups, -1) * x.expand(len(levels), groups)[..., None]).flatten(1)

    diagonal = gather(levels * h.diagonal())
    residual = gather((weight - forth(scale)) @ h)
    solved = conjugate_gradients(
        lambda x: gather(forth(x) @ h), residual, scale, lambda x: _divided(x, diagonal), separate=True
    )
    sound = ((solved > 0) | (scale <= 0)).all(1, keepdim=True)
    return torch.where(sound, solved, scale)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    residual: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor] = lambda x: x,
    *,
    separate: bool = False,
) -> Tensor:
    """About the x with operator(x) = right, from `start`; every step lowers  ⟨x, operator(x)⟩ / 2 - ⟨x, right⟩.

    Args:
        operator: linear, symmetric, of no negative eigenvalue.
        residual: right - operator(start).
        start: of any shape.
        precondition: about the inverse of `operator`, symmetric.
        separate: rows of x are problems of their own.
    """
    dims = tuple(range(int(separate), start.dim()))

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(dims, keepdim=True, dtype=torch.float64)

    def ratio(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > 0, x / y, 0.0).to(start.dtype)

    x = start
    direction = precondition(residual)
    size = first = dot(residual, direction)
    unknowns = start[0].numel() if separate else start.numel()
    for _ in range(min(STEPS, unknowns)):
        if bool((size <= ENOUGH * first).all()):
            break
        image = operator(direction)
        step = ratio(size, dot(direction, image))
        x = x + step * direction
        residual = residual - step * image
        near = precondition(residual)
        new = dot(residual, near)
        direction = near + ratio(new, size) * direction
        size = new
    return x


def _inverses(normal: Tensor) -> Tensor:
    """Of matrices [n, r, r], positive semi-definite, each with a little more on its diagonal: [n, r, r]."""
    rank = normal.shape[1]
    wide = normal.double()
    pull = 1e-6 * wide.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
    inverse = 1 / (wide + pull[:, None, None]) if rank == 1 else torch.cholesky_inverse(cholesky_factors(wide, pull)[0])
    return inverse.to(normal.dtype)


def _times(matrices: Tensor, x: Tensor) -> Tensor:
    """[n, r, r] times [n, r], row by row."""
    return (matrices @ x[..., None])[..., 0]


def _divided(x: Tensor, diagonal: Tensor) -> Tensor:
    return torch.where(diagonal > 0, x / diagonal, 0.0)
