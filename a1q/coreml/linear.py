"""A matrix as MIL operations in fp16: 1x1 convolutions on (1, channels, 1, positions), and rows looked up.

| form | y = W x | row of W |
|---|---|---|
| dense, a LUT alone, or integers in blocks | convolution | gather |
| rank 1, `y = a * Q(b * x)` | multiply, convolution, multiply | gather Q and a, multiply |
| rank r | x * b as (1, in, r, S), one convolution, * a, sum over r | gather Q and a, sum of a * b over r, multiply |

Scales that are palettes are `constexpr_lut_to_dense` too, with a table per rank.

The scales stand before and after the convolution and never behind the LUT: a scale folded into the weight would
make a dense weight of it, and `constexpr_blockwise_shift_scale` behind a LUT is reported not to load everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from a1q.coreml.weights import Array, Blocks, Linear, Palette, VectorPalettes


def constant(name: str, value: Array) -> Any:
    """A constant stored once for all functions of the package that name it so."""
    from coremltools.converters.mil import Builder as mb

    var = mb.const(val=value, name=name)
    var.op.weight_id = name
    return var


class Matrix:
    """A weight [out, in] inside one function: products and look-ups read the same constants.

    Args:
        weight: what it holds.
        name: of its constants; equal in all functions that share them.
    """

    def __init__(self, weight: Linear, name: str):
        self.weight = weight
        self.name = name
        self.stored = _stored(weight, name)
        """Var (out, in, 1, 1)."""
        self.rank = 1 if weight.a is None else weight.a.shape[1]
        self.a = None if weight.a is None else _vectors(weight.a, weight.a_palettes, f"{name}_a")
        """Var (1, out, r, 1) or None."""
        self.b = None if weight.b is None else _vectors(weight.b.T, weight.b_palettes, f"{name}_b")
        """Var (1, in, r, 1) or None."""

    def times(self, x: Any) -> Any:
        """(1, in, 1, S) -> (1, out, 1, S), bias and adapter included."""
        from coremltools.converters.mil import Builder as mb

        weight = self.weight
        y = mb.conv(x=x if self.b is None else mb.mul(x=x, y=self.b), weight=self.stored)
        if self.a is not None:
            y = mb.mul(x=y, y=self.a)
        if self.rank > 1:
            y = mb.reduce_sum(x=y, axes=[2], keep_dims=True)
        if weight.bias is not None:
            y = mb.add(x=y, y=constant(f"{self.name}_bias", weight.bias.reshape(1, -1, 1, 1)))
        if weight.adapter is not None:
            down, up = (
                constant(f"{self.name}_lora_{part}", matrix[:, :, None, None])
                for part, matrix in zip("AB", weight.adapter, strict=True)
            )
            y = mb.add(x=y, y=mb.conv(x=mb.conv(x=x, weight=down), weight=up))
        return y

    def rows(self, ids: Any) -> Any:
        """Rows int32 (1, S) -> (1, in, 1, S)."""
        from coremltools.converters.mil import Builder as mb

        size = self.weight.shape[1]
        found = mb.gather(x=self.stored, indices=ids, axis=0, validate_indices=False)
        # -1: a package of embeddings alone takes one id or many
        x = mb.transpose(x=mb.reshape(x=found, shape=[1, -1, 1, size]), perm=[0, 3, 2, 1])
        if self.a is None:
            return x
        a = mb.gather(x=self.a, indices=ids, axis=1, validate_indices=False)
        scale = mb.transpose(x=mb.reshape(x=a, shape=[1, 1, -1, self.rank]), perm=[0, 1, 3, 2])
        if self.b is not None:
            scale = mb.mul(x=scale, y=self.b)
        if self.rank > 1:
            scale = mb.reduce_sum(x=scale, axes=[2], keep_dims=True)
        return mb.mul(x=x, y=scale)


def linear(x: Any, weight: Linear, name: str) -> Any:
    """Apply `weight` to `x` (1, in, 1, S), giving (1, out, 1, S)."""
    return Matrix(weight, name).times(x)


def _stored(weight: Linear, name: str) -> Any:
    if weight.palette is not None:
        return _palettized(weight.palette, name)
    if weight.blocks is not None:
        return _blockwise(weight.blocks, name)
    assert weight.dense is not None
    return constant(f"{name}_weight", weight.dense[:, :, None, None])


def _palettized(palette: Palette, name: str) -> Any:
    """The weight (out, in, 1, 1) from our own indices and tables."""
    from coremltools.converters.mil import Builder as mb

    indices = constant(f"{name}_indices", palette.indices[:, :, None, None].view(_unsigned(palette.bits)))
    entries = palette.lut.reshape(*palette.lut.shape[:2], palette.vector)
    lut = constant(f"{name}_lut", entries[:, None, None, None])
    axis = {"vector_axis": 0} if palette.vector > 1 else {}
    return mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=f"{name}_weight", **axis)


def _vectors(plain: Array, palettes: VectorPalettes | None, name: str) -> Any:
    """Scales [n, r] as (1, n, r, 1)."""
    from coremltools.converters.mil import Builder as mb

    if palettes is None:
        return constant(name, np.ascontiguousarray(plain)[None, :, :, None])
    indices = np.ascontiguousarray(palettes.indices)[None, :, :, None].view(_unsigned(palettes.bits))
    return mb.constexpr_lut_to_dense(
        indices=constant(f"{name}_indices", indices),
        lut=constant(f"{name}_lut", palettes.lut[None, None, :, None, :, None]),
        name=name,
    )


def _blockwise(blocks: Blocks, name: str) -> Any:
    """The weight (out, in, 1, 1) from integers, scales and zero points."""
    from coremltools.converters.mil import Builder as mb

    kind = _unsigned(blocks.bits)
    return mb.constexpr_blockwise_shift_scale(
        data=constant(f"{name}_codes", blocks.codes[:, :, None, None].view(kind)),
        scale=constant(f"{name}_scale", blocks.scale[:, :, None, None]),
        offset=constant(f"{name}_zero", blocks.zero[:, :, None, None].view(kind)),
        name=f"{name}_weight",
    )


def _unsigned(bits: int) -> Any:
    """The NumPy type in which coremltools takes unsigned integers of so many bits: uint8, marked."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
