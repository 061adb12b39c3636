"""What schemes of a table times a scale of low rank have in common: Ŵ = T[place] ⊙ (A diag(g) B).

Beside `indices` and `lut` their parts are `a` [out, r], `g` [r], `b` [r, in], and `gain` [out], which never trains:
indices are those of the entries nearest to gain ⊙ W. Snapped parts are fp16 and hold A√g and √gB as `a` and `b`,
without `g` and `gain`. S = A diag(g) B may be negative at ranks above 1 and has no floor; at rank 1 fits keep a, b > 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from a1q.quant.scheme import Scheme, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.lowrank import Fit

SCALES = ("a", "g", "b")


class LowRankScale(Scheme):
    """Entries of one table times a scale; a subclass says what an index stands for."""

    @property
    def details(self) -> str:
        return f"rank {self.config.rank}"

    @property
    def hardware(self) -> str:
        return "palette"

    @property
    def forms(self) -> tuple[str, ...]:
        return ("dense", "factored", "batched")

    def check(self, shape: Shape) -> list[str]:
        if self.config.rank > min(shape):
            return [f"rank {self.config.rank} is more than the smaller side of {shape[0]}x{shape[1]}"]
        return []

    def scale_bits(self, shape: Shape) -> int:
        """Bits of A and B."""
        return 16 * self.config.rank * (shape[0] + shape[1])

    def scale_shapes(self, shape: Shape, snapped: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of all parts but indices and table."""
        rank = self.config.rank
        own = {} if snapped else {"g": (rank,), "gain": (shape[0],)}
        return {"a": (shape[0], rank), **own, "b": (rank, shape[1])}

    def numbers(self, lut: Tensor) -> Tensor:
        """The numbers that the part `lut` stands for, in the shape in which they are snapped."""
        return lut

    @abstractmethod
    def table(self, lut: Tensor) -> Tensor:
        """T [1, n], every number that `lut` holds."""

    @abstractmethod
    def places(self, indices: Tensor) -> Tensor:
        """Uint8 [out, in], where in T the number of each weight stands."""

    @abstractmethod
    def indices_of(self, places: Tensor) -> Tensor:
        """The indices that `places` spells out."""

    @abstractmethod
    def nearest_places(self, weight: Tensor, table: Tensor, scale: Tensor | None, gain: Tensor | None) -> Tensor:
        """Places uint8 [out, in] of what lies nearest to gain ⊙ W, S = `scale` [out, in]."""

    def parts_of(self, fit: Fit, weight: Tensor | None, gain: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of a fit over T, with the indices nearest to `weight` where given."""
        from a1q.quant.lowrank import balance

        a, g, b = balance(fit)
        gain = fit.a.new_ones(len(fit.a)) if gain is None else gain
        parts = {"lut": fit.lut, "a": a, "g": g, "b": b, "gain": gain}
        return {"indices": self.indices_of(fit.indices) if weight is None else self.assign(parts, weight), **parts}

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        from a1q.quant.grid import lookup
        from a1q.quant.straight_through import scale_of

        parts = _wide(parts)
        entries = lookup(self.table(parts["lut"]), self.places(parts["indices"]))
        return entries * scale_of(parts["a"], parts.get("g"), parts["b"])

    def weight(self, parts: Mapping[str, Tensor], latent: Tensor | None, fp16: bool) -> Tensor:
        from a1q.quant.straight_through import grid_weight

        places = self.places(parts["indices"]) if latent is None else parts["indices"]
        factors = (parts["a"], parts["g"], parts["b"])
        table = self.table(parts["lut"])
        return grid_weight(places, latent, table, factors, fp16, parts["gain"], self.nearest_places)

    def assign(self, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        import torch

        from a1q.quant.straight_through import scale_of

        parts = _wide(parts)
        table = self.table(parts["lut"])
        with torch.autocast(table.device.type, enabled=False):
            scale = scale_of(parts["a"], parts.get("g"), parts["b"])
            return self.indices_of(self.nearest_places(weight.to(table), table, scale, parts.get("gain")))

    def rounded(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        from a1q.quant.straight_through import fold, rounded_through

        a, b = fold(parts["a"], parts["g"], parts["b"])
        grid = {"lut": rounded_through(self.numbers(parts["lut"])), "a": rounded_through(a), "b": rounded_through(b)}
        return {**parts, **grid, "g": torch.ones_like(parts["g"])}

    def snap_scale(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`a` and `b` as stored for good."""
        from a1q.quant.grid import to_fp16
        from a1q.quant.straight_through import fold

        a, b = fold(parts["a"], parts.get("g"), parts["b"])
        return {"a": to_fp16(a), "b": to_fp16(b)}

    def product(self, parts: Mapping[str, Tensor], latent: Tensor | None, x: Tensor, fp16: bool) -> Tensor | None:
        from a1q.quant.straight_through import fold, rounded_through
        from a1q.quant.table_product import table_product

        if self.config.rank != 1:
            return None
        parts = _wide(parts)
        a, b, table, gain = parts["a"], parts["b"], self.table(parts["lut"]), parts.get("gain")
        if fp16:
            a, b = (rounded_through(part) for part in fold(a, parts.get("g"), b))
            table = rounded_through(table)
        elif "g" in parts:
            a = a * parts["g"]
        places = self.places(parts["indices"]) if latent is None else parts["indices"]
        return table_product(x, table, places, a[:, 0], b[0], latent, gain, self.nearest_places)

    def apply(self, parts: Mapping[str, Tensor], x: Tensor, form: str) -> Tensor:
        from torch.nn.functional import linear

        from a1q.quant.grid import lookup

        if form == "dense":
            return super().apply(parts, x, form)
        parts = _wide(parts)
        a, b = parts["a"], parts["b"]
        if "g" in parts:
            a = a * parts["g"]
        entries = lookup(self.table(parts["lut"]), self.places(parts["indices"])).to(x.dtype)
        a, b = a.to(x.dtype), b.to(x.dtype)
        if form == "batched":  # one product for all ranks: [..., r, in] x [in, out], then a sum over r
            return (linear(x[..., None, :] * b, entries) * a.T).sum(-2)
        total = linear(x * b[0], entries) * a[:, 0]
        for left, right in zip(a.T[1:], b[1:], strict=True):
            total = total + linear(x * right, entries) * left
        return total


def _wide(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts with fp16 ones widened to fp32 (exact); fp32 and fp64 stay."""
    import torch

    return {name: part.float() if part.dtype == torch.float16 else part for name, part in parts.items()}
