"""Linears of other trained methods by their formulas: ParetoQ's SEQ and mlx-lm's DWQ."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from a1q.quant.grid import round_fp16
from a1q.quant.uniform import blocked, search_scale, search_scale_and_zero

FP16 = 16


class TrainableLinear(nn.Linear):
    """y = x Ŵᵀ with a quantized weight that trains; `weight` of the base class is unused."""

    bits: int
    """All that is stored of the module."""

    @abstractmethod
    def quantized(self) -> Tensor:
        """Ŵ [out, in], differentiable."""

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by set: `weights`, `scales`."""

    @abstractmethod
    def round_stored(self) -> None:
        """Round what is stored as a float to fp16, in place."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.quantized(), self.bias)

    def _take(self, dense: nn.Linear) -> None:
        """Become a linear of the same shape without a weight of its own."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.register_parameter("bias", dense.bias)


class SeqLinear(TrainableLinear):
    """Stretched elastic quantization of ParetoQ (arXiv 2502.02631), 2 bits.

        Ŵ = α (round(k/2 clip(W/α, -1, 1) - 1/2) + 1/2) / (k/2),   k = 4 levels: -3/4, -1/4, 1/4, 3/4 of α

    with a learned α per group of inputs. Gradients by W and α are those of LSQ: rounding passes them on, clipping does
    not. α starts at the group's largest weight, as published, or where the squared error is least.
    """

    def __init__(self, dense: nn.Linear, group_size: int, start: str):
        self._take(dense)
        weight = dense.weight.detach().clone()
        rows, columns = weight.shape
        alpha = weight.view(rows, columns // group_size, group_size).abs().amax(-1)
        if start == "mse":  # levels α/2 (code - 3/2)
            alpha = 2 * search_scale(weight, weight.new_ones(columns), alpha * 2 / 3, 1.5, 3)
        self.latent, self.alpha = nn.Parameter(weight), nn.Parameter(alpha)
        self.bits = 2 * weight.numel() + FP16 * alpha.numel()

    def quantized(self) -> Tensor:
        alpha = self.alpha.clamp_min(1e-5)[..., None]
        place = (blocked(self.latent, self.alpha) / alpha).clamp(-1, 1)
        level = ((2 * place.detach()).floor().clamp(-2, 1) + 0.5) / 2
        return (alpha * (place + (level - place).detach())).reshape(self.latent.shape)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"weights": [self.latent], "scales": [self.alpha]}

    @torch.no_grad()
    def round_stored(self) -> None:
        self.latent.copy_(self.quantized())  # the codes are those that training saw
        self.alpha.copy_(round_fp16(self.alpha.clamp_min(1e-5)))


class DwqLinear(TrainableLinear):
    """Distilled weight quantization as in mlx-lm: Ŵ = s q + b with frozen codes q; scales s and biases b train.

    Start: codes, scales and biases of least squared error per group.
    """

    def __init__(self, dense: nn.Linear, bits: int, group_size: int):
        self._take(dense)
        weight = dense.weight.detach()
        rows, columns = weight.shape
        values = weight.view(rows, columns // group_size, group_size)
        low, high = values.amin(-1).clamp_max(0), values.amax(-1).clamp_min(0)
        scale, zero = search_scale_and_zero(weight, weight.new_ones(columns), low, high, 2**bits - 1)
        codes = (values / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
        self.register_buffer("codes", codes)
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(-scale * zero)
        self.bits = bits * weight.numel() + FP16 * 2 * scale.numel()

    codes: Tensor

    def quantized(self) -> Tensor:
        return (self.scale[..., None] * self.codes + self.shift[..., None]).reshape(self.out_features, -1)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"scales": [self.scale, self.shift]}

    @torch.no_grad()
    def round_stored(self) -> None:
        self.scale.copy_(round_fp16(self.scale))
        self.shift.copy_(round_fp16(self.shift))
