"""A linear as MIL operations: 1x1 convolutions on tensors (1, channels, 1, positions), in fp16.

| form | operations |
|---|---|
| dense, or a LUT alone | convolution |
| rank 1, `y = a * Q(b * x)` | multiply, convolution, multiply |
| rank r | x * b as (1, in, r, S), one convolution, * a, sum over r |

The scales stand before and after the convolution and never behind the LUT: a scale folded into the weight would
make a dense weight of it, and `constexpr_blockwise_shift_scale` behind a LUT is reported not to load everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from a1q.coreml.weights import Array, Linear, Palette


def constant(name: str, value: Array) -> Any:
    """A constant stored once for all functions of the package that name it so."""
    from coremltools.converters.mil import Builder as mb

    var = mb.const(val=value, name=name)
    var.op.weight_id = name
    return var


def linear(x: Any, weight: Linear, name: str) -> Any:
    """Apply `weight` to `x` (1, in, 1, S), giving (1, out, 1, S)."""
    from coremltools.converters.mil import Builder as mb

    y = _product(x, weight, name)
    if weight.bias is not None:
        y = mb.add(x=y, y=constant(f"{name}_bias", weight.bias.reshape(1, -1, 1, 1)))
    if weight.adapter is not None:
        down, up = weight.adapter
        inner = mb.conv(x=x, weight=constant(f"{name}_lora_A", down[:, :, None, None]))
        y = mb.add(x=y, y=mb.conv(x=inner, weight=constant(f"{name}_lora_B", up[:, :, None, None])))
    return y


def _product(x: Any, weight: Linear, name: str) -> Any:
    from coremltools.converters.mil import Builder as mb

    if weight.palette is None:
        assert weight.dense is not None
        return mb.conv(x=x, weight=constant(f"{name}_weight", weight.dense[:, :, None, None]))
    palettized = palettized_weight(weight.palette, name)
    if weight.a is None or weight.b is None:
        return mb.conv(x=x, weight=palettized)
    rank = weight.b.shape[0]
    b = constant(f"{name}_b", np.ascontiguousarray(weight.b.T).reshape(1, -1, rank, 1))
    a = constant(f"{name}_a", weight.a.reshape(1, -1, rank, 1))
    y = mb.mul(x=mb.conv(x=mb.mul(x=x, y=b), weight=palettized), y=a)
    return y if rank == 1 else mb.reduce_sum(x=y, axes=[2], keep_dims=True)


def palettized_weight(palette: Palette, name: str) -> Any:
    """The weight (out, in, 1, 1) of a 1x1 convolution from our own indices and tables."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    index_type = types.nptype_from_builtin(types.string_to_builtin(f"uint{palette.bits}"))
    indices = constant(f"{name}_indices", palette.indices[:, :, None, None].astype(index_type))
    lut = constant(f"{name}_lut", palette.lut[:, None, None, None, :, None])
    return mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=f"{name}_weight")
