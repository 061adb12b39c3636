"""Exact least squares of a grid's numbers under  Σ_i r_i (w_i - ŵ_i)ᵀ H (w_i - ŵ_i),  H = E[x xᵀ], with codes held.

Each function fits one factor of Ŵ = LUT[codes] ⊙ (A B) with the others held. A small pull towards where the factor
stood (`PROXIMAL`) keeps singular systems solvable, and a solution still never raises the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from a1q.quant.feedback import TableGrid
from a1q.quant.grid import ascending, lookup

PROXIMAL = 1e-6
"""Weight of the pull, relative to the mean diagonal of the normal equations."""
EXACT_COLUMNS = 1536
"""Up to so many columns B of rank 1 is solved by factorization; above, and at higher ranks, by conjugate gradients."""
ITERATIONS = 12
"""Conjugate-gradient steps per solve. Solves start at the last result, so a handful is enough (measured at rank 8)."""
TABLE = 16
"""Up to so many entries tables are fitted under H: it takes a product with H for each."""


def solve_rows(weight: Tensor, designs: Sequence[Tensor], h: Tensor, a: Tensor, positive: bool) -> Tensor:
    """A [out, r] for Ŵ = Σ_k diag(a_k) D_k: row i solves (D_i H D_iᵀ) a_i = D_i H w_i, D_i [r, in] its `designs`.

    Args:
        weight: [out, in].
        designs: r matrices [out, in].
        h: H [in, in], in the type of `weight`.
        a: [out, r], where it stood.
        positive: keep what would turn <= 0 where it stood; at r = 1 only.
    """
    target = weight @ h
    count = len(designs)
    normal = weight.new_empty(len(weight), count, count, dtype=torch.float64)
    right = weight.new_empty(len(weight), count, dtype=torch.float64)
    for k, design in enumerate(designs):
        right[:, k] = (design * target).sum(1, dtype=torch.float64)
        product = design @ h
        for m in range(k, count):
            normal[:, k, m] = normal[:, m, k] = (product * designs[m]).sum(1, dtype=torch.float64)
    pull = PROXIMAL * normal.diagonal(dim1=1, dim2=2).mean() + torch.finfo(torch.float64).tiny
    normal = normal + pull * torch.eye(count, dtype=normal.dtype, device=normal.device)
    solved = torch.linalg.solve(normal, right + pull * a.double()).to(a.dtype)
    return torch.where(solved > 0, solved, a) if positive else solved


def solve_columns(weight: Tensor, entries: Tensor, h: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    """B [r, in] for Ŵ = Q ⊙ (A B).

    At rank 1 the normal equations are  (H ⊙ Qᵀ diag(r a²) Q) b = diag(…)  of size in; at rank r they have r · in
    unknowns and are solved by conjugate gradients on  B -> Aᵀ(diag(r) ((Q ⊙ A B) H ⊙ Q)).  At rank 1, columns that
    would turn negative stay where they stood.

    Args:
        weight: [out, in].
        entries: Q = LUT[codes] [out, in].
        h: H [in, in], in the type of `weight`.
        a: [out, r].
        b: [r, in], where it stood.
        rows: r [out].
    """
    left = a * rows[:, None]
    right = left.T @ ((weight @ h) * entries)
    if len(b) == 1 and b.shape[1] <= EXACT_COLUMNS:
        scaled = entries * a
        normal = h.double() * (scaled.T @ (scaled * rows[:, None])).double()
        pull = PROXIMAL * normal.diagonal().mean() + torch.finfo(torch.float64).tiny
        normal.diagonal().add_(pull)
        factor = torch.linalg.cholesky(normal)
        solved = torch.cholesky_solve((right.double() + pull * b.double()).T, factor).T.to(b.dtype)
    else:
        solved = _conjugate_gradients(lambda x: left.T @ (((entries * (a @ x)) @ h) * entries), right, b)
    return torch.where(solved > 0, solved, b) if len(b) == 1 else solved


def solve_tables(
    weight: Tensor, codes: Tensor, scale: Tensor | None, h: Tensor, lut: Tensor, rows: Tensor | None = None
) -> Tensor:
    """LUT [n, L] for Ŵ = LUT[codes] ⊙ S, table t for the t-th part of the rows; S [out, in] or None for ones.

    With M_l = S where the code is l and 0 elsewhere, a table solves  G x = g,  G_lm = ⟨M_l, M_m H⟩,  g_l = ⟨M_l, W H⟩
    over its rows. Tables of more than `TABLE` entries stay.
    """
    entries = lut.shape[1]
    if entries > TABLE:
        return lut
    one = weight.new_ones(())
    masks = [torch.where(codes == code, one if scale is None else scale, 0.0) for code in range(entries)]

    def per_table(product: Tensor) -> Tensor:
        sums = product.sum(1, dtype=torch.float64)
        return (sums if rows is None else sums * rows).reshape(len(lut), -1).sum(1)

    target = weight @ h
    normal = weight.new_empty(len(lut), entries, entries, dtype=torch.float64)
    right = torch.stack([per_table(mask * target) for mask in masks], dim=1)
    for k, mask in enumerate(masks):
        product = mask @ h
        for m in range(k, entries):
            normal[:, k, m] = normal[:, m, k] = per_table(product * masks[m])
    pull = PROXIMAL * normal.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float64).tiny
    normal = normal + pull[:, None, None] * torch.eye(entries, dtype=normal.dtype, device=normal.device)
    return torch.linalg.solve(normal, right + pull[:, None] * lut.double()).to(lut.dtype)


class LowRankState:
    """LUT ⊙ (A B) as `a1q.quant.feedback.alternate` adjusts it."""

    def __init__(self, weight: Tensor, h: Tensor, rows: Tensor, lut: Tensor, a: Tensor, b: Tensor, learn_lut: bool):
        """Take W [out, in], H [in, in], r [out], LUT [L], A [out, r], B [r, in]."""
        self.weight, self.h, self.rows = weight, h.to(weight.dtype), rows
        self.lut, self.a, self.b, self.learn_lut = lut, a, b, learn_lut

    def grid(self) -> TableGrid:
        return TableGrid(self.lut[None], self.a @ self.b)

    def solve(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        entries = lookup(self.lut[None], codes)
        designs = [entries * row for row in self.b]
        self.a = solve_rows(self.weight, designs, self.h, self.a, positive=len(self.b) == 1)
        self.b = solve_columns(self.weight, entries, self.h, self.a, self.b, self.rows)
        scale = self.a @ self.b
        if self.learn_lut:
            lut = solve_tables(self.weight, codes, scale, self.h, self.lut[None], self.rows)
            codes, lut = ascending(codes, lut)
            self.lut = lut[0]
        return codes, lookup(self.lut[None], codes) * scale


class TableState:
    """Tables alone, Ŵ = LUT[codes]."""

    def __init__(self, weight: Tensor, h: Tensor, rows: Tensor, lut: Tensor):
        """Take W [out, in], H [in, in], r [out], LUT [n, L]."""
        self.weight, self.h, self.rows, self.lut = weight, h.to(weight.dtype), rows, lut

    def grid(self) -> TableGrid:
        return TableGrid(self.lut, None)

    def solve(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        lut = solve_tables(self.weight, codes, None, self.h, self.lut, self.rows)
        codes, self.lut = ascending(codes, lut)
        return codes, lookup(self.lut, codes)


def _conjugate_gradients(operator: Callable[[Tensor], Tensor], right: Tensor, start: Tensor) -> Tensor:
    """About the x with operator(x) = right, from `start`; every step lowers the quadratic."""
    x = start.clone()
    residual = right - operator(x)
    direction = residual.clone()
    size = residual.square().sum(dtype=torch.float64)
    first = size
    for _ in range(ITERATIONS):
        if float(size) <= 1e-12 * float(first):
            break
        image = operator(direction)
        curvature = (direction * image).sum(dtype=torch.float64)
        if float(curvature) <= 0:
            break
        step = float(size / curvature)
        x = x + step * direction
        residual = residual - step * image
        new = residual.square().sum(dtype=torch.float64)
        direction = residual + float(new / size) * direction
        size = new
    return x
