"""Look-up table times low-rank scale: Ŵ = LUT[idx] ⊙ (A diag(g) B).

Parts: `indices` uint8 [out, in], `lut` [2**bits] ascending, and those of `a1q.quant.low_rank_scale`. Fits by `als` make
rows of Ŵ larger by `gain` than least squares would (`a1q.quant.lowrank.unit_gain`), with the indices of the unscaled
grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a1q.quant.feedback_options import FeedbackOptions
from a1q.quant.low_rank_scale import SCALES, LowRankScale
from a1q.quant.scheme import Palettized, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.importance import Inputs


@dataclass(frozen=True)
class LutLowrankConfig(FeedbackOptions):
    """Options, described in the schema."""

    bits: int
    rank: int
    lut: str
    group_size: int
    rounds: int


class LutLowrank(LowRankScale):
    """One table per weight and a scale of rank r, by default a row scale times a column scale."""

    version = 7
    Config = LutLowrankConfig

    def __init__(self, config: LutLowrankConfig):
        super().__init__(config)
        learned = {"lut": ("lut",)} if config.lut == "learned" else {}
        self.trainable = {"scales": SCALES, "magnitudes": ("g",), **learned}

    def bits(self, shape: Shape) -> int:
        rows, columns = shape
        return self.config.bits * rows * columns + 16 * 2**self.config.bits + self.scale_bits(shape)

    def part_shapes(self, shape: Shape, snapped: bool = False) -> dict[str, tuple[int, ...]]:
        return {"lut": (2**self.config.bits,), **self.scale_shapes(shape, snapped)}

    def fit(self, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
        from a1q.quant import lowrank
        from a1q.quant.adjustable import LowRankState
        from a1q.quant.importance import importance_of, row_importance_of

        config = self.config
        weight = weight.detach().float()
        if config.fit == "absmax_svd":
            fit = lowrank.absmax_svd(weight, config.bits, config.rank, config.group_size)
            return self.parts_of(fit, weight)
        importance = importance_of(weight, inputs)
        rows = row_importance_of(weight, inputs)
        learned = config.lut == "learned"
        stall = lowrank.START_STALL if config.feeds_back(inputs) else lowrank.STALL
        fit = lowrank.als(weight, importance, config.bits, config.rank, learned, config.rounds, rows=rows, stall=stall)
        found = config.feed_back(
            weight,
            inputs,
            fit.indices,
            lambda target, spread: LowRankState(target, fit.lut, fit.a * spread, fit.b, learned),
        )
        if found is None:
            gain = lowrank.unit_gain(fit, weight, importance)
            fit.a = fit.a * gain[:, None]
            return self.parts_of(fit, weight, gain)
        state, codes = found
        return self.parts_of(lowrank.Fit(codes, state.lut, state.a, state.b), None)

    def table(self, lut: Tensor) -> Tensor:
        return lut[None]

    def places(self, indices: Tensor) -> Tensor:
        return indices

    def indices_of(self, places: Tensor) -> Tensor:
        return places

    def nearest_places(self, weight: Tensor, table: Tensor, scale: Tensor | None, gain: Tensor | None) -> Tensor:
        from a1q.quant.straight_through import assign

        return assign(weight, table, scale, gain)

    def snap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import snap_lut

        indices, lut = snap_lut(parts["indices"], parts["lut"][None])
        return {"indices": indices, "lut": lut[0], **self.snap_scale(parts)}

    def select_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        by_row = {name: parts[name].index_select(0, rows) for name in ("indices", "a", "gain") if name in parts}
        return {**parts, **by_row}

    def hardware_form(self, parts: Mapping[str, Tensor]) -> Palettized:
        return Palettized(parts["indices"], parts["lut"][None], parts["a"], parts["b"])
