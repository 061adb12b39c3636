"""Look-up table times low-rank scale: Ŵ = LUT[idx] ⊙ (A diag(g) B).

Parts: `indices` uint8 [out, in], `lut` [2**bits] ascending (half as many increments of a symmetric one that still
trains, `a1q.quant.symmetric`), and those of `a1q.quant.low_rank_scale`. Fits by `als` make
rows of Ŵ larger by `gain` than least squares would (`a1q.quant.lowrank.unit_gain`), with the indices of the unscaled
grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a1q.quant.feedback_options import FeedbackOptions
from a1q.quant.low_rank_scale import LowRankScale
from a1q.quant.scheme import Palettized, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.importance import Inputs
    from a1q.quant.lowrank import Fit


@dataclass(frozen=True)
class LutLowrankConfig(FeedbackOptions):
    """Options, described in the schema."""

    bits: int
    rank: int
    factor_bits: int
    lut: str
    group_size: int
    rounds: int


class LutLowrank(LowRankScale):
    """One table per weight and a scale of rank r, by default a row scale times a column scale."""

    version = 8
    Config = LutLowrankConfig

    def __init__(self, config: LutLowrankConfig):
        super().__init__(config)
        learned = {"lut": ("lut",)} if config.lut != "fixed" else {}
        self.trainable = {"scales": self.scales, "magnitudes": ("g",), **learned}

    def bits(self, shape: Shape) -> int:
        rows, columns = shape
        return self.config.bits * rows * columns + 16 * 2**self.config.bits + self.scale_bits(shape)

    def part_shapes(self, shape: Shape, snapped: bool = False) -> dict[str, tuple[int, ...]]:
        half = self.config.lut == "symmetric" and not snapped
        return {"lut": (2 ** (self.config.bits - half),), **self.scale_shapes(shape, snapped)}

    def fit(self, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
        from a1q.quant import lowrank
        from a1q.quant.adjustable import LowRankState
        from a1q.quant.importance import importance_of, row_importance_of
        from a1q.quant.symmetric import make_symmetric

        config = self.config
        weight = weight.detach().float()
        if config.fit == "absmax_svd":
            fit = lowrank.absmax_svd(weight, config.bits, config.rank, config.group_size)
            return self._told(fit, weight)
        importance = importance_of(weight, inputs)
        rows = row_importance_of(weight, inputs)
        learned = config.lut != "fixed"
        stall = lowrank.START_STALL if config.feeds_back(inputs) else lowrank.STALL
        fit = lowrank.als(weight, importance, config.bits, config.rank, learned, config.rounds, rows=rows, stall=stall)
        if config.lut == "symmetric":
            make_symmetric(fit, weight, importance, rows)
        found = config.feed_back(
            weight,
            inputs,
            fit.indices,
            lambda target, spread: LowRankState(target, fit.lut, fit.a * spread, fit.b, config.lut == "learned"),
        )
        if found is None:
            gain = lowrank.unit_gain(fit, weight, importance)
            fit.a = fit.a * gain[:, None]
            return self._told(fit, weight, gain)
        state, codes = found
        return self._told(lowrank.Fit(codes, state.lut, state.a, state.b), None)

    def _told(self, fit: Fit, weight: Tensor | None, gain: Tensor | None = None) -> dict[str, Tensor]:
        """`parts_of` of a fit whose `lut` holds the entries themselves."""
        from a1q.quant.symmetric import increments_of

        if self.config.lut == "symmetric":
            fit.lut = increments_of(fit.lut)
        return self.parts_of(fit, weight, gain)

    def numbers(self, lut: Tensor) -> Tensor:
        from a1q.quant.symmetric import entries_of

        return lut if len(lut) == 2**self.config.bits else entries_of(lut)

    def table(self, lut: Tensor) -> Tensor:
        return self.numbers(lut)[None]

    def places(self, indices: Tensor) -> Tensor:
        return indices

    def indices_of(self, places: Tensor) -> Tensor:
        return places

    def nearest_places(self, weight: Tensor, table: Tensor, scale: Tensor | None, gain: Tensor | None) -> Tensor:
        from a1q.quant.straight_through import assign

        return assign(weight, table, scale, gain)

    def snap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import snap_lut

        indices, lut = snap_lut(parts["indices"], self.table(parts["lut"]))
        return {"indices": indices, "lut": lut[0], **self.snap_scale(parts)}

    def select_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        indices = parts["indices"].index_select(0, rows)
        return {**parts, **self.rows_by_part(parts, rows), "indices": indices}

    def hardware_form(self, parts: Mapping[str, Tensor]) -> Palettized:
        return self.palettized(parts)
