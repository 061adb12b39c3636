"""Table of vectors times low-rank scale: Ŵ[i d + j, k] = LUT[idx[i, k], j] ⊙ (A diag(g) B), j = 0 … d - 1.

Vector palettization with a scale: an index of bits · d bits stands for d consecutive output channels of one input, so
that the vectors can lie where weights do, where `lut_lowrank` has a grid of d equal axes. At as many bits pairs leave
about a twelfth less squared error at 2 bits, an eighth at 3, and nothing at 1, where vectors of 4 do. Parts: `indices`
uint8 [out / d, in], `lut` [2**(bits d), d], and those of `a1q.quant.low_rank_scale`.

Core ML holds it as `constexpr_lut_to_dense` with vectors along outputs, the only axis on which the Neural Engine is
reported to take them, one table per weight and 256 numbers in it at most.
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


@dataclass(frozen=True)
class VectorLutConfig(FeedbackOptions):
    """Options, described in the schema."""

    bits: float
    vector: int
    rank: int
    factor_bits: int
    rounds: int


class VectorLut(LowRankScale):
    """One table of vectors per weight and a scale of rank r, by default a row scale times a column scale."""

    version = 2
    Config = VectorLutConfig

    def __init__(self, config: VectorLutConfig):
        super().__init__(config)
        self.trainable = {"scales": self.scales, "magnitudes": ("g",), "lut": ("lut",)}

    @property
    def vector(self) -> int:
        return int(self.config.vector)

    @property
    def entries(self) -> int:
        """Vectors in the table."""
        return int(2**self.index_bits)

    @property
    def details(self) -> str:
        return f"vectors of {self.vector}, {super().details}"

    def check(self, shape: Shape) -> list[str]:
        from a1q.quant.vectors import LARGEST

        found = super().check(shape)
        if self.entries * self.vector > LARGEST:
            found.append(
                f"{self.entries} vectors of {self.vector} are more than the {LARGEST} numbers that a table may have on "
                f"a Neural Engine: take fewer `bits`" + (" or a smaller `vector`" if self.vector > 2 else "")
            )
        if shape[0] % self.vector:
            found.append(f"{shape[0]} output channels are no multiple of `vector: {self.vector}`")
        return found

    def bits(self, shape: Shape) -> int:
        rows, columns = shape
        table = 16 * self.entries * self.vector
        return self.index_bits * (rows // self.vector) * columns + table + self.scale_bits(shape)

    def part_shapes(self, shape: Shape, snapped: bool = False) -> dict[str, tuple[int, ...]]:
        return {"lut": (self.entries, self.vector), **self.scale_shapes(shape, snapped)}

    def fit(self, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
        from a1q.quant import lowrank
        from a1q.quant.adjustable import VectorState
        from a1q.quant.grid import safe_scale
        from a1q.quant.importance import importance_of, row_importance_of
        from a1q.quant.vectors import kmeans

        config, size = self.config, self.vector
        problems = self.check((weight.shape[0], weight.shape[1]))
        if problems:
            raise ValueError("; ".join(problems))
        weight = weight.detach().float()
        importance = importance_of(weight, inputs)
        rows = row_importance_of(weight, inputs)
        # scales come from a fit of numbers: they hang on the weight more than on what is looked up
        near, stall = round(config.bits), lowrank.START_STALL
        start = lowrank.als(weight, importance, near, config.rank, True, config.rounds, rows=rows, stall=stall)
        scale = start.scale()
        use = scale.square() * importance  # of rows alike, as where the nearest vectors are chosen
        table = kmeans(weight / safe_scale(scale), use, self.entries, size)
        places = self.nearest_places(weight, self.table(table), scale, None)
        fit = lowrank.Fit(places, table.flatten(), start.a, start.b)
        found = config.feed_back(
            weight,
            inputs,
            fit.indices,
            lambda target, spread: VectorState(target, fit.lut * spread, fit.a, fit.b, True, size),
        )
        if found is not None:
            state, codes = found
            return self._in_vectors(self.parts_of(lowrank.Fit(codes, state.lut, state.a, state.b), None))
        gain = lowrank.unit_gain(fit, weight, importance)
        fit.a = fit.a * gain[:, None]
        parts = self._in_vectors(self.parts_of(fit, None, gain))
        return {**parts, "indices": self.assign(parts, weight)}

    def _in_vectors(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**parts, "lut": parts["lut"].reshape(-1, self.vector)}

    def table(self, lut: Tensor) -> Tensor:
        return lut.reshape(1, -1)

    def tables_of_rows(self, lut: Tensor) -> tuple[Tensor, bool]:
        return lut.reshape(-1, self.vector).T, True

    def places(self, indices: Tensor) -> Tensor:
        from a1q.quant.vectors import spelled

        return spelled(indices, self.vector)

    def indices_of(self, places: Tensor) -> Tensor:
        from a1q.quant.vectors import indices_of

        return indices_of(places, self.vector)

    def nearest_places(self, weight: Tensor, table: Tensor, scale: Tensor | None, gain: Tensor | None) -> Tensor:
        from a1q.quant.vectors import nearest_vectors

        assert scale is not None
        target = weight if gain is None else weight * gain[:, None]
        return self.places(nearest_vectors(target, table.reshape(-1, self.vector), scale))

    def snap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import to_fp16

        return {"indices": parts["indices"].cpu(), "lut": to_fp16(parts["lut"]), **self.snap_scale(parts)}

    def select_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        indices = parts["indices"].index_select(0, rows[:: self.vector] // self.vector)
        return {**parts, **self.rows_by_part(parts, rows), "indices": indices}

    def hardware_form(self, parts: Mapping[str, Tensor]) -> Palettized:
        return self.palettized(parts)
