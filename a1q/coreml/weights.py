"""The weights of a decoder as NumPy arrays in the form in which Core ML will hold them.

A linear is `y = W x + bias + B(A x)` with `W = palette` or `W = palette * (a @ b)` elementwise or `W` dense;
`(A, B)` is an unmerged adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from a1q.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from a1q.quant.linear import QuantLinear

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Palette:
    """A weight as indices into lookup tables."""

    indices: Array
    """uint8 [out, in], values below 2**bits."""
    lut: Array
    """float16 [tables, 2**bits]; each table serves out / tables consecutive rows."""

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return int(self.lut.shape[1]).bit_length() - 1

    @property
    def rows_per_table(self) -> int:
        """Consecutive rows (output channels) that share a table."""
        return int(self.indices.shape[0] // self.lut.shape[0])


@dataclass(frozen=True)
class Linear:
    """One linear module."""

    dense: Array | None = None
    """float16 [out, in]; None where `palette` says the weight."""
    palette: Palette | None = None
    a: Array | None = None
    """float16 [out, r]: scales of the outputs."""
    b: Array | None = None
    """float16 [r, in]: scales of the inputs."""
    bias: Array | None = None
    """float16 [out]."""
    adapter: tuple[Array, Array] | None = None
    """float16 (A [rank, in], B [out, rank]), alpha / rank multiplied into B."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        matrix = self.dense if self.palette is None else self.palette.indices
        assert matrix is not None
        return matrix.shape[0], matrix.shape[1]

    def rows(self, start: int, stop: int) -> Linear:
        """The part that computes outputs `start` to `stop`; a table must not be cut in two."""

        def cut(array: Array | None) -> Array | None:
            return None if array is None else array[start:stop]

        palette = self.palette
        if palette is not None:
            step = palette.rows_per_table
            lut = palette.lut if len(palette.lut) == 1 else palette.lut[start // step : stop // step]
            palette = Palette(palette.indices[start:stop], lut)
        adapter = None if self.adapter is None else (self.adapter[0], self.adapter[1][start:stop])
        return replace(
            self, dense=cut(self.dense), palette=palette, a=cut(self.a), bias=cut(self.bias), adapter=adapter
        )

    def dequantize(self) -> Array:
        """The weight [out, in] in float32, adapter excluded."""
        if self.palette is None:
            assert self.dense is not None
            return self.dense.astype(np.float32)
        tables = np.repeat(self.palette.lut.astype(np.float32), self.palette.rows_per_table, axis=0)
        weight = np.take_along_axis(tables, self.palette.indices.astype(np.int64), axis=1)
        if self.a is None or self.b is None:
            return weight
        return weight * (self.a.astype(np.float32) @ self.b.astype(np.float32))


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder, by Hugging Face module name."""

    embedding: Array
    """float16 [vocabulary, hidden]."""
    linears: Mapping[str, Linear]
    """Projections, and `lm_head` unless it is tied."""
    norms: Mapping[str, Array]
    """float32 vectors."""

    def head(self) -> Linear:
        """The head; the embedding's values where it is tied."""
        return self.linears.get("lm_head") or Linear(dense=self.embedding)


def decoder_weights(model: nn.Module) -> DecoderWeights:
    """Collect the weights of a Hugging Face decoder; quantized modules keep their own indices and tables.

    Raises:
        StageError: if a number does not fit fp16.
    """
    from torch import nn

    from a1q.quant.linear import QuantLinear

    linears: dict[str, Linear] = {}
    norms: dict[str, Array] = {}
    embedding: Array | None = None
    tied = bool(model.config.tie_word_embeddings)  # type: ignore[union-attr]
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            linears[name] = _quantized_linear(module, name)
        elif isinstance(module, nn.Embedding):
            embedding = half(module.weight, name)
        elif isinstance(module, nn.Linear):
            if not (tied and name == "lm_head"):
                linears[name] = Linear(dense=half(module.weight, name), bias=_optional(module.bias, f"{name}.bias"))
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            norms[name] = half(module.weight, name).astype(np.float32)
    assert embedding is not None, "a decoder without an embedding"
    return DecoderWeights(embedding, linears, norms)


def _quantized_linear(module: QuantLinear, name: str) -> Linear:
    parts = module.parts()
    lut = half(parts["lut"], f"{name}.lut")
    adapter = None
    if module.lora_A is not None and module.lora_B is not None:
        scale = module.adapter_alpha / len(module.lora_A)
        adapter = half(module.lora_A, f"{name}.lora_A"), half(module.lora_B.float() * scale, f"{name}.lora_B")
    return Linear(
        palette=Palette(parts["indices"].numpy(), lut.reshape(-1, lut.shape[-1])),
        a=_optional(parts.get("a"), f"{name}.a"),
        b=_optional(parts.get("b"), f"{name}.b"),
        bias=_optional(module.bias, f"{name}.bias"),
        adapter=adapter,
    )


def half(tensor: Tensor, name: str) -> Array:
    """A tensor as a float16 array.

    Raises:
        StageError: if a number does not fit.
    """
    array = tensor.detach().float().numpy()
    with np.errstate(over="ignore"):
        result = array.astype(np.float16)
    if not np.isfinite(result).all():
        raise StageError(f"{name} does not fit fp16: its largest value is {np.abs(array).max():g}, fp16 ends at 65504")
    return result


def _optional(tensor: Tensor | None, name: str) -> Array | None:
    return None if tensor is None else half(tensor, name)
