"""The grids whose numbers are fitted under E[x xᵀ], as `a1q.quant.feedback.alternate` adjusts them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from a1q.quant.feedback import TableGrid, UniformGrid
from a1q.quant.gram_least_squares import solve_columns, solve_rows, solve_scales, solve_tables
from a1q.quant.grid import ascending, lookup
from a1q.quant.uniform import level_values
from a1q.quant.vectors import VectorGrid


@dataclass(frozen=True)
class Target:
    """What is fitted."""

    weight: Tensor
    """W [out, in]."""
    h: Tensor
    """H [in, in]."""
    rows: Tensor
    """r [out], how much the errors of each row count."""


@dataclass
class LowRankState:
    """LUT ⊙ (A B)."""

    target: Target
    lut: Tensor
    """[L], ascending."""
    a: Tensor
    """[out, r]"""
    b: Tensor
    """[r, in]"""
    learn_lut: bool

    def grid(self) -> TableGrid:
        return TableGrid(self.lut[None], self.a @ self.b)

    def values(self, codes: Tensor) -> Tensor:
        return lookup(self.lut[None], codes) * (self.a @ self.b)

    def solve(self, codes: Tensor) -> Tensor:
        weight, h, rows = self.target.weight, self.target.h, self.target.rows
        entries = lookup(self.lut[None], codes)
        self.a = solve_rows(weight, entries, h, self.a, self.b)
        self.b = solve_columns(weight, entries, h, self.a, self.b, rows)
        if not self.learn_lut:
            return codes
        return self._named(codes, solve_tables(weight, codes, self.a @ self.b, h, self.lut[None], rows))

    def _named(self, codes: Tensor, lut: Tensor) -> Tensor:
        """Take a new table [1, L], in ascending order; codes renamed with it."""
        codes, lut = ascending(codes, lut)
        self.lut = lut[0]
        return codes


@dataclass
class VectorState(LowRankState):
    """The same of vectors along rows: `lut` holds them one after the other, and codes are places in it."""

    size: int
    """d, numbers in a vector."""

    def grid(self) -> VectorGrid:  # type: ignore[override]
        return VectorGrid(self.lut.reshape(-1, self.size), self.a @ self.b, self.target.rows)

    def _named(self, codes: Tensor, lut: Tensor) -> Tensor:
        self.lut = lut[0]
        return codes


@dataclass
class TableState:
    """Tables alone, LUT[codes]."""

    target: Target
    lut: Tensor
    """[n, L], rows ascending; table t serves the t-th part of the rows."""

    def grid(self) -> TableGrid:
        return TableGrid(self.lut, None)

    def values(self, codes: Tensor) -> Tensor:
        return lookup(self.lut, codes)

    def solve(self, codes: Tensor) -> Tensor:
        lut = solve_tables(self.target.weight, codes, None, self.target.h, self.lut, self.target.rows)
        codes, self.lut = ascending(codes, lut)
        return codes


@dataclass
class UniformState:
    """s (code - z) with codes 0 … top; z stays."""

    target: Target
    scale: Tensor
    """s [out, groups], or [1, 1] for all rows; >= 0."""
    zero: Tensor | float
    """z [out, groups], or a number."""
    top: int

    def grid(self) -> UniformGrid:
        return UniformGrid(self._scale(), self.zero, self.top, self.target.weight.shape[1])

    def values(self, codes: Tensor) -> Tensor:
        return level_values(codes, self._scale(), self.zero)

    def solve(self, codes: Tensor) -> Tensor:
        levels = level_values(codes, torch.ones_like(self._scale()), self.zero)
        self.scale = solve_scales(self.target.weight, levels, self.target.h, self.scale, self.target.rows)
        return codes

    def _scale(self) -> Tensor:
        return self.scale.expand(len(self.target.weight), -1)
