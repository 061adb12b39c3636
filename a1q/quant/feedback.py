"""Codes chosen so that the errors of one column make up for those of others: error feedback, then coordinate descent.

Both lower  E = Σ_i (w_i - ŵ_i)ᵀ H (w_i - ŵ_i)  with H = E[x xᵀ], the squared error of a linear's output, over the codes
of a grid that stays as it is. Whatever the scheme, it is asked for one column's nearest codes at a time.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from a1q.quant.grid import safe_scale

BLOCK = 64
"""Columns whose corrections are gathered before the rest of the matrix sees them; it changes speed, not results."""


class Grid(Protocol):
    """The values that weights may take."""

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes uint8 [out] and values [out] of what column `column` can hold nearest to `values` [out]."""


class TableGrid:
    """Table entries times a scale: LUT[code] ⊙ S."""

    def __init__(self, lut: Tensor, scale: Tensor | None):
        """Take `lut` [n, L], rows ascending, table t for the t-th part of the rows; S [out, in] or None for ones."""
        self.lut = lut
        self.edges = (lut[:, 1:] + lut[:, :-1]) / 2
        # columns lie side by side in a row-major matrix; here one is read at a time
        self.scale = self.divisor = None
        if scale is not None:
            self.scale = scale.T.contiguous()
            self.divisor = safe_scale(self.scale)

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        scaled = values if self.divisor is None else values / self.divisor[column]
        if len(self.lut) == 1:
            codes = torch.bucketize(scaled, self.edges[0], out_int32=True)
            found = self.lut[0].index_select(0, codes)
        else:
            position = torch.searchsorted(self.edges, scaled.reshape(len(self.lut), -1))
            codes, found = position.reshape(-1), self.lut.gather(1, position).reshape(-1)
        return codes.to(torch.uint8), found if self.scale is None else found.mul_(self.scale[column])


class UniformGrid:
    """Evenly spaced values: s (code - z), code = 0 … top."""

    def __init__(self, scale: Tensor, zero: Tensor | float, top: int, columns: int):
        """Take s [out, groups] and z, as s or one number, for groups of consecutive columns out of `columns`."""
        self.top, self.length = top, columns // scale.shape[1]
        self.scale = scale.T.contiguous()
        self.divisor = safe_scale(self.scale)
        self.zero = zero.T.contiguous() if isinstance(zero, Tensor) else [zero] * len(self.scale)

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        group = column // self.length
        zero = self.zero[group]
        codes = (values / self.divisor[group]).add_(zero).round_().clamp_(0, self.top)
        return codes.to(torch.uint8), (codes - zero).mul_(self.scale[group])


def damped(gram: Tensor, damping: float) -> Tensor:
    """H [in, in] float64 with `damping` times its mean diagonal added to the diagonal, and silent inputs at that least.

    A sample of fewer tokens than inputs, or with constant or silent channels, gives a singular H; this one is definite.
    """
    h = gram.double()
    mean = h.diagonal().mean()
    level = torch.where(mean > 0, mean * damping, 1.0)
    return (h + h.T) / 2 + level * torch.eye(len(h), dtype=h.dtype, device=h.device)


@dataclass(frozen=True)
class Factor:
    """H as `sweep` uses it; one for all sweeps."""

    order: list[int]
    """Columns, those of the largest inputs first."""
    upper: Tensor
    """U [in, in], upper triangular, with UᵀU the inverse of H in that order."""


def factor_of(h: Tensor) -> Factor:
    """Of H [in, in] float64.

    Raises:
        ValueError: if H is not positive definite.
    """
    order = h.diagonal().argsort(descending=True, stable=True)
    backwards = order.flip(0)
    # H = R Rᵀ with an upper triangular R, which is a Cholesky factor of H read backwards; then U = R⁻¹
    root, failed = torch.linalg.cholesky_ex(h[backwards][:, backwards])
    if int(failed):
        raise ValueError("E[x x^T] is not positive definite: more `damping` makes it so")
    one = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return Factor(order.tolist(), torch.linalg.solve_triangular(root.flip(0, 1), one, upper=True))


def sweep(weight: Tensor, h: Tensor, grid: Grid, factor: Factor | None = None) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, in] and values [out, in] by error feedback, columns of the largest inputs first.

    Column by column, a column's rounding error is spread over the columns still to come such that they make up for it
    best: with U the upper Cholesky factor of H⁻¹, column k > j loses (w_j - ŵ_j) / U_jj · U_jk (GPTQ, Frantar et al.,
    2022, arXiv:2210.17323, sections 3.2 and 3.3).

    Args:
        weight: [out, in].
        h: H [in, in] float64, positive definite.
        factor: that of `h`, where known.
    """
    factor = factor_of(h) if factor is None else factor
    order = torch.tensor(factor.order, device=weight.device)
    upper = factor.upper.to(weight.dtype)
    slopes = factor.upper.diagonal().tolist()
    columns = len(order)
    left = weight.T[order].contiguous()  # [in, out]: a column is a row here, and so contiguous
    codes = torch.empty(left.shape, dtype=torch.uint8, device=weight.device)
    values = torch.empty_like(left)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        block, near = left[begin:end], upper[begin:end, begin:end]
        errors = torch.empty_like(block)
        for i in range(end - begin):
            place = begin + i
            codes[place], found = grid.nearest(block[i], factor.order[place])
            values[place] = found
            torch.sub(block[i], found, out=errors[i]).div_(slopes[place])
            block[i + 1 :].addr_(near[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    back = order.argsort()
    return codes[back].T.contiguous(), values[back].T.contiguous()


def descend(weight: Tensor, h: Tensor, grid: Grid, codes: Tensor, values: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """Better codes [out, in] and values [out, in] by coordinate descent; no pass raises the error.

    With all others held, the best value of column j is ŵ_j + ((W - Ŵ) H)_j / H_jj, and the nearest one on the grid
    the best there (QuantEase, Behdin et al., 2023, arXiv:2309.01885). Error feedback looks only ahead; this looks at
    both sides.

    Args:
        weight: [out, in].
        h: H [in, in], positive definite.
        codes: uint8 [out, in], where it starts.
        values: [out, in], the values of `codes`.
        passes: over all columns, at most; it ends once nothing changes.
    """
    h = h.to(weight.dtype)
    diagonal = h.diagonal().tolist()
    codes, values = codes.T.contiguous(), values.T.contiguous()
    pull = h @ (weight.T - values)  # [in, out]: the gradient, but for its sign and a factor 2
    columns = len(h)
    for _ in range(passes):
        before = codes.clone()
        for begin in range(0, columns, BLOCK):
            end = min(begin + BLOCK, columns)
            block, old = pull[begin:end], values[begin:end].clone()
            moved = torch.empty_like(old)
            near = h[begin:end, begin:end].unbind()
            for i, (row, was, step) in enumerate(zip(block.unbind(), old.unbind(), moved.unbind(), strict=True)):
                place = begin + i
                codes[place], found = grid.nearest(torch.add(was, row, alpha=1 / diagonal[place]), place)
                torch.sub(found, was, out=step)
                values[place] = found
                block.addr_(near[i], step, alpha=-1)
            pull[:begin].addmm_(h[:begin, begin:end], moved, alpha=-1)
            pull[end:].addmm_(h[end:, begin:end], moved, alpha=-1)
        if torch.equal(codes, before):
            break
    return codes.T.contiguous(), values.T.contiguous()


class Adjustable(Protocol):
    """A grid whose numbers can be fitted; its fields are replaced, never written into."""

    def grid(self) -> Grid:
        """The grid as it stands."""

    def values(self, codes: Tensor) -> Tensor:
        """What `codes` [out, in] stand for, [out, in]."""

    def solve(self, codes: Tensor) -> Tensor:
        """Fit the grid's numbers with `codes` [out, in] held, by least squares; return codes [out, in].

        They come back renamed where the grid now counts in another order.
        """


State = TypeVar("State", bound=Adjustable)


def alternate(
    weight: Tensor,
    h: Tensor,
    state: State,
    sweeps: int,
    passes: int,
    rows: Tensor | None = None,
    known: tuple[State, Tensor] | None = None,
) -> tuple[State, Tensor]:
    """The state and codes uint8 [out, in] of least error among `sweeps` rounds of codes, then least squares.

    Args:
        weight: [out, in].
        h: H [in, in] float64, positive definite.
        state: where the grid starts.
        passes: of coordinate descent after every sweep, and at the end, at most.
        rows: how much each row's error counts, [out]; ones where None.
        known: another state and codes [out, in], than which the result is no worse.
    """
    factor, inexact = factor_of(h), h.to(weight.dtype)
    best: tuple[float, State, Tensor, Tensor] | None = None
    if known is not None:
        values = known[0].values(known[1])
        best = quadratic_error(weight, values, inexact, rows), *known, values
    for _ in range(sweeps):
        codes, values = sweep(weight, h, state.grid(), factor)
        codes, values = descend(weight, inexact, state.grid(), codes, values, passes)
        state = copy(state)
        codes = state.solve(codes)
        values = state.values(codes)
        error = quadratic_error(weight, values, inexact, rows)
        if best is None or error < best[0]:
            best = error, state, codes, values
    assert best is not None
    _, state, codes, values = best
    codes, _ = descend(weight, inexact, state.grid(), codes, values, passes)
    return state, codes


def quadratic_error(weight: Tensor, values: Tensor, h: Tensor, rows: Tensor | None = None) -> float:
    """Σ_i r_i (w_i - ŵ_i)ᵀ H (w_i - ŵ_i), in float64 sums."""
    difference = weight - values
    per_row = ((difference @ h.to(difference.dtype)) * difference).double().sum(1)
    return float(per_row.sum() if rows is None else per_row @ rows.double())
