"""Products with a weight of bytes: y = x Pᵀ + (Σ x) shift, where P = Σ_p scale_p ⊙ bytes_p, at the speed of memory.

A token's products want every weight once, so what costs is reading it. fbgemm multiplies packed int8 by unsigned
activations of 8 bits, summing in integers. That is exact as long as no two neighbouring products exceed 16 bits, which
processors without VNNI keep them in: so activations are taken apart into digits of 7 bits,

    x = u / 64 · Σ_k digit_k 128⁻ᵏ,   u = max|x| of a position,   |digit_k| <= 64,   k = 0, 1, 2

and the digits of one position are three rows of one product. x is rounded to 2⁻²¹ u; beyond that only float32 rounds.
Three rows take hardly longer than one, and no row is ever made of floats. Where there is no fbgemm, blocks of the bytes
become float32 as they are multiplied: as exact, and slower.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

BASE, DIGITS, LARGEST_DIGIT = 128, 3, 64
ROWS = 1 << 13
"""Rows of a weight that are packed together."""
FEW = 1 << 22
"""Numbers that a block of positions may make on the way."""
UPCAST = 1 << 18
"""Bytes that become floats at a time, without fbgemm; they stay in the cache."""
LEAST = 1e-30
"""Least u: positions of zeros give zeros."""
ROUNDING = 1.5 * 2**23
"""Floats of this size are whole: adding it rounds, several times faster than `round`."""
ENGINE = "fbgemm"
POWERS = torch.tensor([float(LARGEST_DIGIT * BASE**digit) for digit in range(DIGITS)])[:, None, None]
WORTH = torch.tensor([BASE**-digit / LARGEST_DIGIT for digit in range(DIGITS)])
"""Of each digit, in units of u."""


class Planes:
    """A weight [out, in] as one or more planes of bytes, each with a scale per row; on the CPU, not trainable."""

    def __init__(self, blocks: Iterable[tuple[Tensor, Tensor]], shift: Tensor | None = None, fast: bool | None = None):
        """Take consecutive rows block by block, so that the whole weight need never be there unpacked.

        Args:
            blocks: (bytes int8 [planes, rows, in], scales [planes, rows]) each, of as many planes.
            shift: [out], what the sum of an x is multiplied with and added.
            fast: whether to use fbgemm; by default where it works.
        """
        self.kind: type[_Packed] | type[_Plain] = _Packed if (fbgemm_works() if fast is None else fast) else _Plain
        self.out_features, self.count, self.in_features = 0, 0, 0
        self._blocks: list[Any] = []
        for octets, scales in blocks:
            self.count, rows, self.in_features = octets.shape
            self.out_features += rows
            self._blocks.append(self.kind(octets, scales.double()))
        self.shift = None if shift is None else shift.float()

    @property
    def nbytes(self) -> int:
        """Bytes that the weight is held in: the planes, and per row of each what is kept beside it."""
        shift = 0 if self.shift is None else self.shift.nbytes
        return self.count * self.out_features * (self.in_features + self.kind.PER_ROW) + shift

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] times the transposed weight, [..., out] float32; without gradients."""
        with torch.no_grad():
            flat = x.detach().reshape(-1, self.in_features).float()
            step = max(1, FEW // (DIGITS * self.count * min(ROWS, self.out_features)))
            found = [self._some(part) for part in flat.split(step)] if len(flat) > step else [self._some(flat)]
            y = found[0] if len(found) == 1 else torch.cat(found)
            if self.shift is not None:
                y.addmm_(flat.sum(1, keepdim=True), self.shift[None])
            return y.reshape(*x.shape[:-1], self.out_features)

    def _some(self, x: Tensor) -> Tensor:
        """`product` of a few positions [t, in], without the shift."""
        prepared = self.kind.prepare(x)
        parts = [block.product(*prepared) for block in self._blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def digits_of(x: Tensor, peak: Tensor) -> Tensor:
    """The digits [3, t, in] of x [t, in], whole floats of at most 64, for peaks max|x| [t, 1]."""
    numbers = (x * (POWERS / peak)).add_(ROUNDING).sub_(ROUNDING)
    numbers[1:].sub_(numbers[:-1] * BASE)
    return numbers


class _Packed:
    """Consecutive rows as fbgemm holds them."""

    PER_ROW = 12
    """Bytes: a scale, a zero point and the sum of a row."""

    def __init__(self, octets: Tensor, scales: Tensor):
        self.planes, self.rows, columns = octets.shape
        flat = octets.reshape(-1, columns)
        with _engine(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to drop what is called here; `fbgemm_works` then says no
            zeros = torch.zeros(len(flat), dtype=torch.int64)
            tensor = torch._make_per_channel_quantized_tensor(flat, scales.reshape(-1), zeros, 0)
            self.packed: Any = torch.ops.quantized.linear_prepack(tensor, None)

    @staticmethod
    def prepare(x: Tensor) -> tuple[Tensor, Tensor]:
        """(digits [3, t, in], peaks [t, 1]) of x [t, in]."""
        peak = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_min_(LEAST)
        return digits_of(x, peak), peak

    def product(self, digits: Tensor, peak: Tensor) -> Tensor:
        """[t, rows]"""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        by_digit = multiply(digits.flatten(0, 1), 1.0, LARGEST_DIGIT, self.packed)
        y = (WORTH @ by_digit.view(DIGITS, -1)).view(-1, self.planes, self.rows)
        return (y[:, 0] if self.planes == 1 else y.sum(1)).mul_(peak)


class _Plain:
    """Consecutive rows as plain bytes."""

    PER_ROW = 4
    """Bytes: a scale."""

    def __init__(self, octets: Tensor, scales: Tensor):
        self.octets, self.scales = octets, scales.float()

    @staticmethod
    def prepare(x: Tensor) -> tuple[Tensor]:
        """x as it is."""
        return (x,)

    def product(self, x: Tensor) -> Tensor:
        """[t, rows]"""
        y = x.new_zeros(len(x), self.octets.shape[1])
        step = max(1, UPCAST // self.octets.shape[2])
        for octets, scales in zip(self.octets, self.scales, strict=True):
            for start in range(0, len(octets), step):
                rows = slice(start, start + step)
                y[:, rows] += linear(x, octets[rows].float()).mul_(scales[rows])
        return y


@functools.cache
def fbgemm_works() -> bool:
    """Whether fbgemm is there and computes exactly what `Planes` asks of it, the largest products included."""
    if ENGINE not in torch.backends.quantized.supported_engines:
        return False
    octets = torch.tensor([[[-128] * 70, [127] * 70, [*range(-35, 35)]]], dtype=torch.int8)
    digits = torch.tensor([[[64.0] * 70], [[-64.0] * 70], [[float(number) for number in range(-35, 35)]]])
    try:
        found = _Packed(octets, torch.ones(1, 3, dtype=torch.float64)).product(digits, torch.ones(1, 1))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    exact = WORTH.double() @ (digits[:, 0].double() @ octets[0].double().T)
    return torch.allclose(found[0].double(), exact, rtol=1e-6, atol=0)


@contextmanager
def _engine() -> Iterator[None]:
    """fbgemm as what packs."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
