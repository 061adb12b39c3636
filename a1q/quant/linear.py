"""The one quantized linear module, whatever the scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.functional import linear

from a1q.models.view import QUANTIZED
from a1q.quant.module import FORMS, QuantModule, quantized_modules
from a1q.quant.tied import swap_module

__all__ = ["FORMS", "QuantLinear", "quantized_modules", "swap_module"]


class QuantLinear(QuantModule, nn.Linear):  # type: ignore[override]
    """y = x Ŵᵀ + bias, plus an optional adapter (alpha / rank) · B (A x)."""

    kind = "linear"

    def __init__(
        self,
        spec: Mapping[str, Any],
        parts: Mapping[str, Tensor],
        bias: Tensor | None = None,
        latent: Tensor | None = None,
        state: str = QUANTIZED,
    ):
        """As `QuantModule`."""
        super().__init__(spec, parts, bias, latent, state)
        self.out_features, self.in_features = self.shape

    @classmethod
    def in_place_of(
        cls,
        dense: nn.Module,
        spec: Mapping[str, Any],
        parts: Mapping[str, Tensor],
        latent: Tensor | None = None,
        state: str = QUANTIZED,
    ) -> Self:
        assert isinstance(dense, nn.Linear)
        return cls(spec, parts, dense.bias, latent, state)

    def forward(self, input: Tensor) -> Tensor:
        y = self.project(input)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.lora_A is not None and self.lora_B is not None:
            low = linear(input, self.lora_A.to(input.dtype))
            y = y + (self.adapter_alpha / len(self.lora_A)) * linear(low, self.lora_B.to(input.dtype))
        return y
