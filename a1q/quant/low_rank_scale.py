"""What schemes of a table times a scale of low rank have in common: Ŵ = T[place] ⊙ (A diag(g) B).

Beside `indices` and `lut` their parts are `a` [out, r], `g` [r], `b` [r, in], and `gain` [out], which never trains:
indices are those of the entries nearest to gain ⊙ W. Snapped parts are fp16 and hold A√g and √gB as `a` and `b`,
without `g` and `gain`. S = A diag(g) B may be negative at ranks above 1 and has no floor; at rank 1 fits keep a, b > 0.
With `factor_bits` below 16, A and B are palettes: `a1q.quant.palettized_factors`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from a1q.quant.scheme import FactorPalettes, Palettized, Scheme, Shape, TableForm

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.lowrank import Fit

SCALES = ("a", "g", "b")
FACTOR_TABLES = ("a_lut", "b_lut")
FP16 = 16
"""`factor_bits` of factors that are no palettes."""


class LowRankScale(Scheme):
    """Entries of one table times a scale; a subclass says what an index stands for."""

    @property
    def palettized_factors(self) -> bool:
        """Whether A and B are palettes."""
        return bool(self.config.factor_bits < FP16)

    @property
    def scales(self) -> tuple[str, ...]:
        """The parts that train as `scales`."""
        return (*SCALES, *FACTOR_TABLES) if self.palettized_factors else SCALES

    @property
    def integers(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("indices", "a_indices", "b_indices") if self.palettized_factors else ("indices",)

    def width(self, part: str) -> int:
        return self.index_bits if part == "indices" else int(self.config.factor_bits)

    @property
    def details(self) -> str:
        factors = f", factors of {self.config.factor_bits} bits" if self.palettized_factors else ""
        return f"rank {self.config.rank}{factors}"

    @property
    def hardware(self) -> str:
        return "palette"

    @property
    def forms(self) -> tuple[str, ...]:
        return ("dense", "factored", "batched")

    def check(self, shape: Shape) -> list[str]:
        if self.config.rank > min(shape):
            return [f"rank {self.config.rank} is more than the smaller side of {shape[0]}x{shape[1]}"]
        if self.palettized_factors and self.scale_bits(shape) >= FP16 * self.config.rank * sum(shape):
            tables = f"tables of {2**self.config.factor_bits} entries for its factors"
            return [f"{tables} take more than they save on {shape[0]}x{shape[1]}; 16 bits have none"]
        return []

    def scale_bits(self, shape: Shape) -> int:
        """Bits of A and B, their tables included."""
        width = self.config.factor_bits
        tables = 2 * FP16 * 2**width if self.palettized_factors else 0
        return int(self.config.rank * (width * sum(shape) + tables))

    def scale_shapes(self, shape: Shape, snapped: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of all parts but indices and table."""
        rank = self.config.rank
        own = {} if snapped else {"g": (rank,), "gain": (shape[0],)}
        tables = dict.fromkeys(FACTOR_TABLES if self.palettized_factors else (), (rank, 2**self.config.factor_bits))
        end = "_indices" if snapped and self.palettized_factors else ""
        return {f"a{end}": (shape[0], rank), **own, f"b{end}": (rank, shape[1]), **tables}

    def numbers(self, lut: Tensor) -> Tensor:
        """The numbers that the part `lut` stands for, in the shape in which they are snapped."""
        return lut

    def rows_by_part(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """What `parts` say of `rows` alone, but for the indices."""
        return {name: parts[name].index_select(0, rows) for name in ("a", "a_indices", "gain") if name in parts}

    @abstractmethod
    def table(self, lut: Tensor) -> Tensor:
        """T [1, n], every number that `lut` holds."""

    def tables_of_rows(self, lut: Tensor) -> tuple[Tensor, bool]:
        """(tables, whether interleaved) of a `TableForm` whose indices are those stored, once for each row."""
        return self.table(lut), False

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
        parts = self.with_factor_tables({"lut": fit.lut, "a": a, "g": g, "b": b, "gain": gain})
        return {"indices": self.indices_of(fit.indices) if weight is None else self.assign(parts, weight), **parts}

    def with_factor_tables(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """`parts`, with tables fitted to `a` and `b` where they are palettes."""
        from a1q.quant.palettized_factors import with_tables

        return with_tables(parts, self.config.factor_bits) if self.palettized_factors else parts

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        from a1q.quant.grid import lookup
        from a1q.quant.straight_through import scale_of

        parts = _counting(parts)
        entries = lookup(self.table(parts["lut"]), self.places(parts["indices"]))
        return entries * scale_of(parts["a"], parts.get("g"), parts["b"])

    def weight(self, parts: Mapping[str, Tensor], latent: Tensor | None, fp16: bool) -> Tensor:
        from a1q.quant.palettized_factors import looked_up
        from a1q.quant.straight_through import grid_weight

        parts = looked_up(parts)
        places = self.places(parts["indices"]) if latent is None else parts["indices"]
        factors = (parts["a"], parts["g"], parts["b"])
        table = self.table(parts["lut"])
        return grid_weight(places, latent, table, factors, fp16, parts["gain"], self.nearest_places)

    def assign(self, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        import torch

        from a1q.quant.straight_through import scale_of

        parts = _counting(parts)
        table = self.table(parts["lut"])
        with torch.autocast(table.device.type, enabled=False):
            scale = scale_of(parts["a"], parts.get("g"), parts["b"])
            return self.indices_of(self.nearest_places(weight.to(table), table, scale, parts.get("gain")))

    def rounded(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        from a1q.quant.palettized_factors import looked_up
        from a1q.quant.straight_through import fold, rounded_through

        parts = looked_up(parts)
        a, b = fold(parts["a"], parts["g"], parts["b"])
        grid = {"lut": rounded_through(self.numbers(parts["lut"])), "a": rounded_through(a), "b": rounded_through(b)}
        return {**parts, **grid, "g": torch.ones_like(parts["g"])}

    def snap_scale(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A and B as stored for good."""
        from a1q.quant.grid import to_fp16
        from a1q.quant.palettized_factors import snapped
        from a1q.quant.straight_through import fold

        if self.palettized_factors:
            return snapped(parts)
        a, b = fold(parts["a"], parts.get("g"), parts["b"])
        return {"a": to_fp16(a), "b": to_fp16(b)}

    def palettized(self, parts: Mapping[str, Tensor]) -> Palettized:
        """Snapped parts for hardware, the table as `parts` hold it."""
        from a1q.quant.palettized_factors import looked_up

        factors = None
        if self.palettized_factors:
            factors = FactorPalettes(parts["a_indices"], parts["a_lut"], parts["b_indices"], parts["b_lut"])
        seen = looked_up(parts)
        return Palettized(parts["indices"], parts["lut"][None], seen["a"], seen["b"], factors)

    def table_form(self, parts: Mapping[str, Tensor]) -> TableForm:
        parts = _counting(parts)
        rows = parts["a"] * parts["g"] if "g" in parts else parts["a"]
        tables, interleaved = self.tables_of_rows(parts["lut"])
        indices = parts["indices"]
        if self.vector > 1:
            indices = indices.repeat_interleave(self.vector, dim=0)
        return TableForm(indices, tables, interleaved, rows, parts["b"])

    def product(self, parts: Mapping[str, Tensor], latent: Tensor | None, x: Tensor, fp16: bool) -> Tensor | None:
        from a1q.quant.straight_through import fold, rounded_through
        from a1q.quant.table_product import table_product

        if self.config.rank != 1:
            return None
        parts = _counting(parts)
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
        parts = _counting(parts)
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


def _counting(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts with fp16 ones widened to fp32 (exact; fp32 and fp64 stay), and factors that are palettes looked up."""
    import torch

    from a1q.quant.palettized_factors import looked_up

    return looked_up({name: part.float() if part.dtype == torch.float16 else part for name, part in parts.items()})
