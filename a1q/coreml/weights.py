"""The weights of a decoder as NumPy arrays in the form in which Core ML will hold them.

A linear is `y = W x + bias + B(A x)` where W is dense, or a palette, or a palette times `a @ b` elementwise, or
integers with a scale and a zero point per block; `(A, B)` is an unmerged adapter. An embedding is such a matrix too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from a1q.coreml.architecture import Architecture, read_architecture
from a1q.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Palette:
    """A weight as indices into lookup tables."""

    indices: Array
    """uint8 [out, in], values below 2**bits; [out / d, in] where each stands for d consecutive rows."""
    lut: Array
    """float16 [tables, 2**bits]; each table serves out / tables consecutive rows. Vectors: [1, 2**bits, d]."""

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return int(self.lut.shape[1]).bit_length() - 1

    @property
    def vector(self) -> int:
        """Consecutive rows (output channels) that one index stands for."""
        return int(self.lut.shape[2]) if self.lut.ndim == 3 else 1

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight."""
        return self.indices.shape[0] * self.vector, self.indices.shape[1]

    @property
    def rows_per_table(self) -> int:
        """Consecutive rows that share a table."""
        return int(self.shape[0] // self.lut.shape[0])

    @property
    def row_step(self) -> int:
        """Rows that must stay together when the weight is cut: those of a vector, or of a table among several."""
        return self.vector if len(self.lut) == 1 else self.rows_per_table

    def rows(self, start: int, stop: int) -> Palette:
        """Rows `start` to `stop`, both multiples of `row_step`."""
        step = self.rows_per_table
        lut = self.lut if len(self.lut) == 1 else self.lut[start // step : stop // step]
        return Palette(self.indices[start // self.vector : stop // self.vector], lut)

    def dequantize(self) -> Array:
        """[out, in] float32."""
        indices = self.indices.astype(np.int64)
        if self.vector > 1:
            return self.lut[0].astype(np.float32)[indices].transpose(0, 2, 1).reshape(self.shape)
        tables = np.repeat(self.lut.astype(np.float32), self.rows_per_table, axis=0)
        return np.take_along_axis(tables, indices, axis=1)


@dataclass(frozen=True)
class Blocks:
    """A weight as unsigned integers with a scale and a zero point per block of a row: scale * (code - zero)."""

    codes: Array
    """uint8 [out, in], values below 2**bits."""
    bits: int
    """4 or 8."""
    scale: Array
    """float16 [out, groups]."""
    zero: Array
    """uint8 [out, groups]."""


@dataclass(frozen=True)
class VectorPalettes:
    """r vectors of n numbers as indices into a lookup table each: how `Linear.a` or `Linear.b` is stored."""

    indices: Array
    """uint8 [n, r], values below 2**bits."""
    lut: Array
    """float16 [r, 2**bits]."""

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return int(self.lut.shape[1]).bit_length() - 1

    @property
    def theory_bits(self) -> int:
        """Bits of indices and tables."""
        return self.bits * self.indices.size + 16 * self.lut.size


@dataclass(frozen=True)
class Linear:
    """One matrix: a linear module, or an embedding (whose rows are looked up)."""

    dense: Array | None = None
    """float16 [out, in]; None where `palette` or `blocks` says the weight."""
    palette: Palette | None = None
    blocks: Blocks | None = None
    a: Array | None = None
    """float16 [out, r]: scales of the outputs."""
    b: Array | None = None
    """float16 [r, in]: scales of the inputs; None with `a` there: r is 1 and they are ones."""
    bias: Array | None = None
    """float16 [out]."""
    adapter: tuple[Array, Array] | None = None
    """float16 (A [rank, in], B [out, rank]), alpha / rank multiplied into B."""
    a_palettes: VectorPalettes | None = None
    """How the columns of `a` are stored; None: as they are."""
    b_palettes: VectorPalettes | None = None
    """How the rows of `b` are stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        matrix = self.dense
        if self.palette is not None:
            return self.palette.shape
        if self.blocks is not None:
            matrix = self.blocks.codes
        assert matrix is not None
        return matrix.shape[0], matrix.shape[1]

    @property
    def row_step(self) -> int:
        """Rows that must stay together when the matrix is cut."""
        return 1 if self.palette is None else self.palette.row_step

    def rows(self, start: int, stop: int) -> Linear:
        """The part that computes outputs `start` to `stop`; no table and no vector must be cut in two."""

        def cut(array: Array | None) -> Array | None:
            return None if array is None else array[start:stop]

        palette = None if self.palette is None else self.palette.rows(start, stop)
        blocks = self.blocks
        if blocks is not None:
            blocks = Blocks(blocks.codes[start:stop], blocks.bits, blocks.scale[start:stop], blocks.zero[start:stop])
        adapter = None if self.adapter is None else (self.adapter[0], self.adapter[1][start:stop])
        scales = self.a_palettes
        if scales is not None:
            scales = VectorPalettes(scales.indices[start:stop], scales.lut)
        bias = cut(self.bias)
        return Linear(cut(self.dense), palette, blocks, cut(self.a), self.b, bias, adapter, scales, self.b_palettes)

    def dequantize(self) -> Array:
        """The weight [out, in] in float32, adapter excluded."""
        if self.blocks is not None:
            repeat = self.blocks.codes.shape[1] // self.blocks.scale.shape[1]
            scale = np.repeat(self.blocks.scale.astype(np.float32), repeat, axis=1)
            return scale * (self.blocks.codes.astype(np.float32) - np.repeat(self.blocks.zero, repeat, axis=1))
        if self.palette is None:
            assert self.dense is not None
            return self.dense.astype(np.float32)
        weight = self.palette.dequantize()
        if self.a is None:
            return weight
        a = self.a.astype(np.float32)
        return weight * (a if self.b is None else a @ self.b.astype(np.float32))

    @property
    def theory_bits(self) -> int:
        """Bits of everything this holds: indices, tables, scales, zero points, bias, adapter."""
        out, columns = self.shape
        bits = 0 if self.dense is None else 16 * out * columns
        if self.palette is not None:
            bits += self.palette.bits * self.palette.indices.size + 16 * self.palette.lut.size
        if self.blocks is not None:
            bits += self.blocks.bits * (out * columns + self.blocks.zero.size) + 16 * self.blocks.scale.size
        vectors = [self.bias, *(self.adapter or ())]
        for plain, palettes in ((self.a, self.a_palettes), (self.b, self.b_palettes)):
            if palettes is None:
                vectors.append(plain)
            else:
                bits += palettes.theory_bits
        return bits + 16 * sum(vector.size for vector in vectors if vector is not None)


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder, by Hugging Face module name."""

    embedding: Linear
    """[vocabulary, hidden], without the factor of `Architecture.embedding_scale`."""
    linears: Mapping[str, Linear]
    """Projections, and `lm_head` unless it is tied."""
    norms: Mapping[str, Array]
    """float32 vectors: the factors themselves (1 + w where a family stores w)."""
    rotations: Mapping[str, tuple[Array, float]]
    """Layer kind -> (angle per position, float32 [head_dim / 2]; factor of cosine and sine)."""

    def head(self) -> Linear:
        """The head; the embedding where it is tied."""
        return self.linears.get("lm_head") or self.embedding

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return "lm_head" not in self.linears

    def without_adapters(self) -> DecoderWeights:
        """The same without unmerged adapters."""
        return replace(self, linears={name: replace(x, adapter=None) for name, x in self.linears.items()})


def decoder_weights(model: nn.Module) -> DecoderWeights:
    """Collect the weights of a Hugging Face decoder; quantized modules keep their own indices and tables.

    Raises:
        StageError: if a number does not fit fp16.
    """
    from torch import nn

    architecture = read_architecture(model.config.to_dict())  # type: ignore[union-attr, operator]
    linears: dict[str, Linear] = {}
    norms: dict[str, Array] = {}
    embedding: Linear | None = None
    for name, module in model.named_modules():
        if architecture.tied and name == "lm_head":
            continue
        if isinstance(module, nn.Embedding):
            embedding = _matrix(module, name)
        elif isinstance(module, nn.Linear):
            linears[name] = _matrix(module, name)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            norms[name] = half(module.weight + architecture.norm_offset, name).astype(np.float32)
    assert embedding is not None, "a decoder without an embedding"
    return DecoderWeights(embedding, linears, norms, _rotations(model, architecture))


def _rotations(model: nn.Module, architecture: Architecture) -> dict[str, tuple[Array, float]]:
    """The model's own frequencies, whatever scaling they came from, by kind of layer."""
    rotary = model.model.rotary_emb  # type: ignore[union-attr]
    found = {}
    for kind in architecture.kinds:
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        frequency = getattr(rotary, f"{prefix}inv_freq").detach().float().numpy()
        found[kind] = frequency, float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    return found


def _matrix(module: Any, name: str) -> Linear:
    """A linear or an embedding, dense or snapped."""
    bias = _optional(getattr(module, "bias", None), f"{name}.bias")
    if not hasattr(module, "scheme"):
        return Linear(dense=half(module.weight, name), bias=bias)
    from a1q.quant.scheme import Blockwise

    form = module.scheme.hardware_form(module.parts())
    adapter = None
    if module.lora_A is not None and module.lora_B is not None:
        scale = module.adapter_alpha / len(module.lora_A)
        adapter = half(module.lora_A, f"{name}.lora_A"), half(module.lora_B.float() * scale, f"{name}.lora_B")
    if isinstance(form, Blockwise):
        blocks = Blocks(form.codes.numpy(), form.bits, half(form.scale, f"{name}.scale"), form.zero.numpy())
        return Linear(blocks=blocks, bias=bias, adapter=adapter)
    a_palettes = b_palettes = None
    if form.factors is not None:
        factors = form.factors
        a_palettes = VectorPalettes(factors.a_indices.numpy(), half(factors.a_lut, f"{name}.a_lut"))
        b_palettes = VectorPalettes(factors.b_indices.T.numpy(), half(factors.b_lut, f"{name}.b_lut"))
    return Linear(
        palette=Palette(form.indices.numpy(), half(form.lut, f"{name}.lut")),
        a=_optional(form.a, f"{name}.a"),
        b=_optional(form.b, f"{name}.b"),
        bias=bias,
        adapter=adapter,
        a_palettes=a_palettes,
        b_palettes=b_palettes,
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
