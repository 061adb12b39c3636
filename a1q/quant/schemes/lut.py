"""Plain look-up tables: Ŵ = LUT[idx], one table per weight, per group of output channels or per output channel.

Parts: `indices` uint8 [out, in], `lut` [tables, 2**bits], rows ascending; table i serves the i-th block of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a1q.quant.feedback_options import FeedbackOptions
from a1q.quant.scheme import Palettized, Scheme, Shape, TableForm

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.importance import Inputs


@dataclass(frozen=True)
class LutConfig(FeedbackOptions):
    """Options, described in the schema."""

    bits: int
    granularity: str
    channels: int
    rounds: int


class Lut(Scheme):
    """k-means palettization, the form that Core ML calls palettized weights."""

    version = 4
    Config = LutConfig

    def __init__(self, config: LutConfig):
        super().__init__(config)
        self.trainable = {"lut": ("lut",)}

    @property
    def details(self) -> str:
        if self.config.granularity == "group":
            return f"a table per {self.config.channels} channels"
        return f"a table per {self.config.granularity}"

    @property
    def hardware(self) -> str:
        return "palette"

    def tables(self, shape: Shape) -> int:
        """Number of tables for a weight [out, in]."""
        rows = {"tensor": shape[0], "group": self.config.channels, "channel": 1}[self.config.granularity]
        return shape[0] // rows

    def check(self, shape: Shape) -> list[str]:
        config = self.config
        if config.granularity == "group" and shape[0] % config.channels:
            return [f"{shape[0]} output channels are no multiple of `channels: {config.channels}`"]
        return []

    def bits(self, shape: Shape) -> int:
        return self.config.bits * shape[0] * shape[1] + 16 * self.tables(shape) * 2**self.config.bits

    def part_shapes(self, shape: Shape, snapped: bool = False) -> dict[str, tuple[int, ...]]:
        return {"lut": (self.tables(shape), 2**self.config.bits)}

    def fit(self, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
        from a1q.quant.adjustable import TableState
        from a1q.quant.importance import importance_of, row_importance_of
        from a1q.quant.kmeans import lloyd, quantile_start

        weight = weight.detach().float()
        use = importance_of(weight, inputs) * row_importance_of(weight, inputs)[:, None]
        count = self.tables((weight.shape[0], weight.shape[1]))
        start = quantile_start(weight.reshape(count, -1), 2**self.config.bits)
        lut = lloyd(weight, use, start, self.config.rounds)
        codes = self.assign({"lut": lut}, weight)
        found = self.config.feed_back(weight, inputs, codes, lambda target, spread: TableState(target, lut * spread))
        return {"indices": codes, "lut": lut} if found is None else {"indices": found[1], "lut": found[0].lut}

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        import torch

        from a1q.quant.grid import lookup

        lut = parts["lut"]
        return lookup(lut.float() if lut.dtype == torch.float16 else lut, parts["indices"])

    def weight(self, parts: Mapping[str, Tensor], latent: Tensor | None, fp16: bool) -> Tensor:
        from a1q.quant.straight_through import grid_weight

        return grid_weight(parts["indices"], latent, parts["lut"], None, fp16)

    def assign(self, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        import torch

        from a1q.quant.grid import nearest

        lut = parts["lut"]
        return nearest(weight, lut.float() if lut.dtype == torch.float16 else lut)

    def snap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import snap_lut

        indices, lut = snap_lut(parts["indices"], parts["lut"])
        return {"indices": indices, "lut": lut}

    def select_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        indices, lut = parts["indices"], parts["lut"]
        if len(lut) > 1:  # a table per row taken
            lut = lut.index_select(0, rows // (len(indices) // len(lut)))
        return {"indices": indices.index_select(0, rows), "lut": lut}

    def hardware_form(self, parts: Mapping[str, Tensor]) -> Palettized:
        return Palettized(parts["indices"], parts["lut"])

    def table_form(self, parts: Mapping[str, Tensor]) -> TableForm:
        return TableForm(parts["indices"], parts["lut"].float())
