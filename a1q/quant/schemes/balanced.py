"""Evenly spaced levels without a zero, balanced around it: Ŵ = s (q - (2**bits - 1) / 2), q = 0 … 2**bits - 1.

At 2 bits the levels are ±0.5 s and ±1.5 s, at 4 bits ±0.5 s … ±7.5 s (Apple Intelligence Foundation Language Models,
tech report 2025, where 2 bits and one scale per tensor are used). The scale is learned as

    s = f max|W| / 2**(bits - 1),   f = softplus(p) + 1e-8

Parts: `indices` uint8 [out, in]; `p` [scales], which trains; `peak` [scales], max|W| of the weights fitted, which does
not: it makes `p` free of units, and stays when a latent moves on, so that one weight never moves a whole grid. A latent
gets no gradient where it is clamped, as published. Where all weights are zero s is zero and stays zero.

Snapped parts: with one scale per channel, `scale` fp16 [out], the levels being implied. A table is all that hardware
needs of one scale per tensor: `lut` fp16 [2**bits], the levels times s.
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

LEAST_FACTOR = 1e-8
PUBLISHED_CLIP = 0.995
"""Quantile of |W| at which the published start clips."""


@dataclass(frozen=True)
class BalancedConfig(FeedbackOptions):
    """Options, described in the schema."""

    bits: int
    granularity: str


class Balanced(Scheme):
    """Levels ±0.5, ±1.5, … times a learned scale per tensor or per output channel."""

    version = 3
    Config = BalancedConfig

    def __init__(self, config: BalancedConfig):
        super().__init__(config)
        self.trainable = {"scales": ("p",)}
        self.top = 2**config.bits - 1
        self.zero = self.top / 2
        self.per_tensor = config.granularity == "tensor"

    @property
    def hardware(self) -> str:
        return "palette"

    @property
    def details(self) -> str:
        return f"a scale per {self.config.granularity}"

    def check(self, shape: Shape) -> list[str]:
        return []

    def bits(self, shape: Shape) -> int:
        numbers = 2**self.config.bits if self.per_tensor else shape[0]
        return self.config.bits * shape[0] * shape[1] + 16 * numbers

    def part_shapes(self, shape: Shape, snapped: bool = False) -> dict[str, tuple[int, ...]]:
        if not snapped:
            count = 1 if self.per_tensor else shape[0]
            return {"p": (count,), "peak": (count,)}
        return {"lut": (2**self.config.bits,)} if self.per_tensor else {"scale": (shape[0],)}

    def fit(self, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
        from a1q.quant.adjustable import UniformState
        from a1q.quant.importance import importance_of, row_importance_of
        from a1q.quant.uniform import search_scale

        weight = weight.detach().float()
        importance = importance_of(weight, inputs)
        rows = weight.reshape(1, -1) if self.per_tensor else weight
        peak = rows.abs().amax(1)
        if self.config.fit == "percentile":
            clip = rows.abs().kthvalue(max(1, round(PUBLISHED_CLIP * rows.shape[1])), dim=1).values
            scale = clip.where(clip > 0, peak) / 2 ** (self.config.bits - 1)
        else:
            h = (importance * row_importance_of(weight, inputs)[:, None]).reshape(rows.shape)
            scale = search_scale(rows, h, (peak / self.zero)[:, None], self.zero, self.top)[:, 0]
        parts = self._parts(scale, peak)
        codes = self.assign(parts, weight)
        found = self.config.feed_back(
            weight,
            inputs,
            codes,
            lambda target, spread: UniformState(target, scale[:, None] * spread, self.zero, self.top),
        )
        if found is None:
            return {"indices": codes, **parts}
        return {"indices": found[1], **self._parts(found[0].scale[:, 0], peak)}

    def _parts(self, scale: Tensor, peak: Tensor) -> dict[str, Tensor]:
        """The parts that say s [scales], for weights of at most `peak` [scales]."""
        import torch

        factor = torch.where(peak > 0, scale * 2 ** (self.config.bits - 1) / peak.clamp_min(1e-30), 1.0).double()
        return {"p": factor.sub(LEAST_FACTOR).clamp_min(LEAST_FACTOR).expm1().log().float(), "peak": peak}

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        from a1q.quant.grid import lookup

        lut, scale = self._grid(parts)
        entries = lookup(lut, parts["indices"])
        return entries if scale is None else entries.mul_(scale)

    def weight(self, parts: Mapping[str, Tensor], latent: Tensor | None, fp16: bool) -> Tensor:
        import torch

        from a1q.quant.uniform import round_through, uniform_weight

        with torch.no_grad():
            grid = {**(self.rounded(parts) if fp16 else parts)}
            if latent is not None:
                grid["indices"] = self.assign(grid, latent)
            value = self.dequantize(grid)
        scale = round_through(self._scale(parts)) if fp16 else self._scale(parts)
        scale = scale[:, None].expand(len(value), 1)
        return uniform_weight(value, grid["indices"], latent, scale, self.zero, self.top)

    def assign(self, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        from a1q.quant.grid import nearest
        from a1q.quant.uniform import round_to_codes

        lut, scale = self._grid(parts)
        if scale is None:  # rounded tables are not quite even
            return nearest(weight.to(lut), lut)
        return round_to_codes(weight.to(lut), scale, self.zero, self.top)

    def rounded(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import round_fp16

        return {"indices": parts["indices"], **{name: round_fp16(part) for name, part in self._final(parts).items()}}

    def snap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import to_fp16

        final = {name: to_fp16(part) for name, part in self._final(parts).items()}
        return {"indices": parts["indices"].cpu(), **final}

    def select_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        return {
            name: part if self.per_tensor and name != "indices" else part.index_select(0, rows)
            for name, part in parts.items()
        }

    def hardware_form(self, parts: Mapping[str, Tensor]) -> Palettized:
        if self.per_tensor:
            return Palettized(parts["indices"], parts["lut"][None])
        return Palettized(parts["indices"], self._levels(parts["scale"])[None], parts["scale"][:, None])

    def table_form(self, parts: Mapping[str, Tensor]) -> TableForm:
        lut, scale = self._grid(parts)
        return TableForm(parts["indices"], lut, rows=scale)

    def apply(self, parts: Mapping[str, Tensor], x: Tensor, form: str) -> Tensor:
        from torch.nn.functional import linear

        from a1q.quant.grid import lookup

        lut, scale = self._grid(parts)
        if form == "dense" or scale is None:
            return super().apply(parts, x, form)
        return linear(x, lookup(lut, parts["indices"]).to(x.dtype)) * scale[:, 0].to(x.dtype)

    def _levels(self, like: Tensor) -> Tensor:
        """-zero … zero in steps of 1, [2**bits], in the type of `like`; exact in fp16."""
        import torch

        return torch.arange(self.top + 1, dtype=like.dtype, device=like.device) - self.zero

    def _scale(self, parts: Mapping[str, Tensor]) -> Tensor:
        """s [scales] of parts that train."""
        from torch.nn.functional import softplus

        return (softplus(parts["p"]) + LEAST_FACTOR) * parts["peak"] / 2 ** (self.config.bits - 1)

    def _final(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers that snap stores, [2**bits] or [out], unrounded unless `parts` hold them rounded."""
        name = "lut" if self.per_tensor else "scale"
        if name in parts:
            return {name: parts[name]}
        scale = self._scale(parts)
        return {name: self._levels(scale) * scale if self.per_tensor else scale}

    def _grid(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(table [1, 2**bits], scale [out, 1] or None), fp16 widened to fp32."""
        import torch

        (final,) = self._final(parts).values()
        if final.dtype == torch.float16:
            final = final.float()
        return (final[None], None) if self.per_tensor else (self._levels(final)[None], final[:, None])
