"""Integers with a scale and a zero point per output channel or per group of inputs: Ŵ = s (q - z), q = 0 … 2**bits - 1.

Symmetric: z = 2**(bits - 1) everywhere and unstored, so that q - z are the signed integers of two's complement.
Otherwise z is one of the codes, so that zero is always a level; the fit finds it and it never trains.

Parts: `indices` uint8 [out, in], the codes; `scale` [out, groups], as fitted, fixed; `factor` [out, groups], which
starts at 1, trains, and multiplies it; `zero` uint8 [out, groups] if not symmetric. A block is in / groups consecutive
inputs of a row. Snapped, `scale` is fp16 and holds both. A latent gets no gradient where it is clamped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a1q.quant.feedback_options import FeedbackOptions
from a1q.quant.scheme import Blockwise, Palettized, Scheme, Shape, TableForm

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.importance import Inputs

BLOCKWISE_BITS = (4, 8)
"""The integer widths that Core ML keeps blockwise."""


@dataclass(frozen=True)
class AffineConfig(FeedbackOptions):
    """Options, described in the schema."""

    bits: int
    symmetric: bool
    granularity: str
    group_size: int


class Affine(Scheme):
    """Uniform integer quantization, the form that Core ML calls linear or blockwise."""

    version = 3
    Config = AffineConfig

    def __init__(self, config: AffineConfig):
        super().__init__(config)
        self.trainable = {"scales": ("factor",)}
        self.integers = ("indices",) if config.symmetric else ("indices", "zero")
        self.top = 2**config.bits - 1
        self.middle = 2 ** (config.bits - 1)

    @property
    def hardware(self) -> str:
        if self.config.symmetric and self.config.granularity == "channel":
            return "palette"
        return "blockwise" if self.config.bits in BLOCKWISE_BITS else ""

    @property
    def details(self) -> str:
        grouped = self.config.granularity == "group"
        numbers = "a scale" if self.config.symmetric else "a scale and a zero point"
        return f"{numbers} per " + (f"{self.config.group_size} inputs" if grouped else "channel")

    def groups(self, shape: Shape) -> int:
        """Blocks per row of a weight [out, in]."""
        return shape[1] // self.config.group_size if self.config.granularity == "group" else 1

    def check(self, shape: Shape) -> list[str]:
        config, inputs = self.config, shape[1]
        found = []
        if config.granularity == "group" and inputs % config.group_size:
            divisors = [size for size in range(1, inputs + 1) if inputs % size == 0]
            below = max(size for size in divisors if size < config.group_size or size == 1)
            above = min((size for size in divisors if size > config.group_size), default=inputs)
            near = " and ".join(map(str, dict.fromkeys((below, above))))
            found.append(f"`group_size: {config.group_size}` does not divide {inputs} inputs; near it {near} do")
        return found

    def bits(self, shape: Shape) -> int:
        each = 16 if self.config.symmetric else 16 + self.config.bits
        return self.config.bits * shape[0] * shape[1] + each * shape[0] * self.groups(shape)

    def part_shapes(self, shape: Shape, snapped: bool = False) -> dict[str, tuple[int, ...]]:
        names = ["scale"] if snapped else ["scale", "factor"]
        return dict.fromkeys(names if self.config.symmetric else [*names, "zero"], (shape[0], self.groups(shape)))

    def fit(self, weight: Tensor, inputs: Inputs | None, seed: int) -> dict[str, Tensor]:
        import torch

        from a1q.quant.adjustable import UniformState
        from a1q.quant.importance import importance_of
        from a1q.quant.uniform import range_scale, search_scale, search_scale_and_zero

        weight = weight.detach().float()
        importance = importance_of(weight, inputs)
        blocks = weight.reshape(len(weight), self.groups((weight.shape[0], weight.shape[1])), -1)
        low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
        search, zero = self.config.fit != "minmax", None
        if self.config.symmetric:
            scale = torch.maximum(-low / self.middle, high / (self.middle - 1))
            if search:
                scale = search_scale(weight, importance, scale, self.middle, self.top)
        elif search:
            scale, zero = search_scale_and_zero(weight, importance, low, high, self.top)
        else:
            scale, zero = range_scale(low, high, self.top)
        parts = {"scale": scale, "factor": torch.ones_like(scale)}
        if zero is not None:
            parts["zero"] = zero.to(torch.uint8)
        codes = self.assign(parts, weight)
        found = self.config.feed_back(
            weight,
            inputs,
            codes,
            lambda target, spread: UniformState(target, scale * spread, self._zero(parts), self.top),
        )
        if found is None:
            return {"indices": codes, **parts}
        return {**parts, "indices": found[1], "scale": found[0].scale}

    def dequantize(self, parts: Mapping[str, Tensor]) -> Tensor:
        from a1q.quant.uniform import level_values

        return level_values(parts["indices"], self._scale(parts), self._zero(parts))

    def weight(self, parts: Mapping[str, Tensor], latent: Tensor | None, fp16: bool) -> Tensor:
        import torch

        from a1q.quant.uniform import round_through, uniform_weight

        scale = round_through(self._scale(parts)) if fp16 else self._scale(parts)
        with torch.no_grad():
            grid = {**(self.rounded(parts) if fp16 else parts)}
            if latent is not None:
                grid["indices"] = self.assign(grid, latent)
            value = self.dequantize(grid)
        return uniform_weight(value, grid["indices"], latent, scale, self._zero(parts), self.top)

    def assign(self, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        from a1q.quant.uniform import round_to_codes

        scale = self._scale(parts)
        return round_to_codes(weight.to(scale), scale, self._zero(parts), self.top)

    def rounded(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import round_fp16

        whole = {name: parts[name] for name in self.integers}
        return {**whole, "scale": round_fp16(self._scale(parts))}

    def snap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from a1q.quant.grid import to_fp16

        whole = {name: parts[name].cpu() for name in self.integers}
        return {**whole, "scale": to_fp16(self._scale(parts))}

    def select_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        return {name: part.index_select(0, rows) for name, part in parts.items()}

    def hardware_form(self, parts: Mapping[str, Tensor]) -> Palettized | Blockwise:
        import torch

        if self.hardware == "palette":
            integers = torch.arange(self.top + 1, device=parts["scale"].device) - self.middle
            return Palettized(parts["indices"], integers.to(torch.float16)[None], parts["scale"])
        if self.hardware == "blockwise":
            zero = parts.get("zero", torch.full_like(parts["scale"], self.middle).to(torch.uint8))
            return Blockwise(parts["indices"], self.config.bits, parts["scale"], zero)
        return super().hardware_form(parts)

    def table_form(self, parts: Mapping[str, Tensor]) -> TableForm | None:
        import torch

        scale = self._scale(parts)
        if scale.shape[1] > 1:
            return None
        codes = torch.arange(self.top + 1, dtype=scale.dtype, device=scale.device)[None] - self.middle
        shift = None if self.config.symmetric else self.middle - self._zero(parts)[:, 0]  # type: ignore[index]
        return TableForm(parts["indices"], codes, rows=scale, shift=shift)

    def apply(self, parts: Mapping[str, Tensor], x: Tensor, form: str) -> Tensor:
        from torch.nn.functional import linear

        scale = self._scale(parts)
        if form == "dense" or scale.shape[1] > 1:
            return super().apply(parts, x, form)
        table = parts["indices"].to(scale.dtype) - self._zero(parts)
        return linear(x, table.to(x.dtype)) * scale[:, 0].to(x.dtype)

    def _scale(self, parts: Mapping[str, Tensor]) -> Tensor:
        """s [out, groups]; fp16 widened to fp32."""
        import torch

        scale = parts["scale"].float() if parts["scale"].dtype == torch.float16 else parts["scale"]
        return scale * parts["factor"] if "factor" in parts else scale

    def _zero(self, parts: Mapping[str, Tensor]) -> Tensor | float:
        """z [out, groups] in the type of s, or the number it is everywhere."""
        return self.middle if self.config.symmetric else parts["zero"].to(self._scale(parts).dtype)
