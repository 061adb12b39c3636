"""Look-up table times low-rank scale: Ŵ = LUT[idx] ⊙ (A diag(g) B).

Parts: `indices` uint8 [out, in], `lut` [2**bits] ascending, `a` [out, r], `g` [r], `b` [r, in], and `gain` [out], which
never trains: indices are those of the entries nearest to gain ⊙ W. Fits by `als` make rows of Ŵ larger by that factor
than least squares would (`a1q.quant.lowrank.unit_gain`), with the indices of the unscaled grid. Snapped parts are fp16
and hold A√g and √gB as `a` and `b`, without `g` and `gain`. S = A diag(g) B may be negative at ranks above 1 and has
no floor; at rank 1 fits keep a, b > 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.quant.feedback_options import FeedbackOptions
from a1q.quant.scheme import Palettized, Scheme, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.importance import Inputs
    from a1q.quant.lowrank import Fit

SCALES = ("a", "g", "b")


@dataclass(frozen=True)
class LutLowrankConfig(FeedbackOptions):
    """Options, described in the schema."""

    bits: int
    rank: int
    lut: str
    group_size: int
    rounds: int


class LutLowrank(Scheme):
    """One table per weight and a scale of rank r, by default a row scale times a column scale."""

    version = 7
    Config = LutLowrankConfig

    def __init__(self, config: LutLowrankConfig):
        super().__init__(config)
        learned = {"lut": ("lut",)} if config.lut == "learned" else {}
        self.trainable = {"scales": SCALES, "magnitudes": ("g",), **learned}

    @property
    def details(self) -> str:
        return f"rank {self.config.rank}"

    @property
    def hardware(self) -> str:
        return "palette"

    def check(self, shape: Shape) -> list[str]:
        if self.config.rank > min(shape):
            return [f"rank {self.config.rank} is more than the smaller side of {shape[0]}x{shape[1]}"]
        return []

    def bits(self, shape: Shape) -> int:
        rows, columns = shape
        return self.config.bits * rows * columns + 16 * (2**self.config.bits + self.config.rank * (rows + columns))

    def part_shapes(self, shape: Shape, snapped: bool = False) -> dict[str, tuple[int, ...]]:
        rank = self.config.rank
        shapes: dict[str, tuple[int, ...]] = {"lut": (2**self.config.bits,), "a": (shape[0], rank)}
        if not snapped:
            shapes |= {"g": (rank,), "gain": (shape[0],)}
        return {**shapes, "b": (rank, shape[1])}

    def fit(self, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
        from a1q.quant import lowrank
        from a1q.quant.adjustable import LowRankState
        from a1q.quant.importance import importance_of, row_importance_of

        config = self.config
        weight = weight.detach().float()
        if config.fit == "absmax_svd":
            fit = lowrank.absmax_svd(weight, config.bits, config.rank, config.group_size)
            return self._parts(fit, weight)
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
            return self._parts(fit, weight, gain)
        state, codes = found
        return self._parts(lowrank.Fit(codes, state.lut, state.a, state.b), None)

    def _parts(self, fit: Fit, weight: Tensor | None, gain: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of a fit, with the indices nearest to `weight` where given."""
        from a1q.quant.lowrank import balance

        a, g, b = balance(fit)
        gain = fit.a.new_ones(len(fit.a)) if gain is None else gain
        parts = {"lut": fit.lut, "a": a, "g": g, "b": b, "gain": gain}
        return {"indices": fit.indices if weight is None else self.assign(parts, weight), **parts}

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        from a1q.quant.grid import lookup
        from a1q.quant.straight_through import scale_of

        parts = _wide(parts)
        return lookup(parts["lut"][None], parts["indices"]) * scale_of(parts["a"], parts.get("g"), parts["b"])

    def weight(self, parts: Mapping[str, Tensor], latent: Tensor | None, fp16: bool) -> Tensor:
        from a1q.quant.straight_through import grid_weight

        factors = (parts["a"], parts["g"], parts["b"])
        return grid_weight(parts["indices"], latent, parts["lut"][None], factors, fp16, parts["gain"])

    def assign(self, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        from a1q.quant.straight_through import assign, scale_of

        parts = _wide(parts)
        scale = scale_of(parts["a"], parts.get("g"), parts["b"])
        return assign(weight.to(parts["lut"]), parts["lut"][None], scale, parts.get("gain"))

    def rounded(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        from a1q.quant.grid import round_fp16
        from a1q.quant.straight_through import fold

        a, b = fold(parts["a"], parts["g"], parts["b"])
        grid = {"lut": round_fp16(parts["lut"]), "a": round_fp16(a), "b": round_fp16(b)}
        return {**parts, **grid, "g": torch.ones_like(parts["g"])}

    def snap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import snap_lut, to_fp16
        from a1q.quant.straight_through import fold

        indices, lut = snap_lut(parts["indices"], parts["lut"][None])
        a, b = fold(parts["a"], parts.get("g"), parts["b"])
        return {"indices": indices, "lut": lut[0], "a": to_fp16(a), "b": to_fp16(b)}

    def select_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        by_row = {name: parts[name].index_select(0, rows) for name in ("indices", "a", "gain") if name in parts}
        return {**parts, **by_row}

    def hardware_form(self, parts: Mapping[str, Tensor]) -> Palettized:
        return Palettized(parts["indices"], parts["lut"][None], parts["a"], parts["b"])

    def apply(self, parts: Mapping[str, Tensor], x: Tensor, form: str) -> Tensor:
        from torch.nn.functional import linear

        from a1q.quant.grid import lookup

        if form == "dense":
            return super().apply(parts, x, form)
        parts = _wide(parts)
        a, b = parts["a"], parts["b"]
        if "g" in parts:
            a = a * parts["g"]
        table = lookup(parts["lut"][None], parts["indices"]).to(x.dtype)
        a, b = a.to(x.dtype), b.to(x.dtype)
        if form == "batched":  # one product for all ranks: [..., r, in] x [in, out], then a sum over r
            return (linear(x[..., None, :] * b, table) * a.T).sum(-2)
        total = linear(x * b[0], table) * a[:, 0]
        for left, right in zip(a.T[1:], b[1:], strict=True):
            total = total + linear(x * right, table) * left
        return total


def _wide(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts with fp16 ones widened to fp32 (exact); fp32 and fp64 stay."""
    import torch

    return {name: part.float() if part.dtype == torch.float16 else part for name, part in parts.items()}
