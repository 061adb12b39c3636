"""MIL operations in NumPy: the ones that decoder packages are made of, on float32 arrays, integers and booleans.

Every function takes the operation's inputs by MIL name. Numbers are what the operation says mathematically, with
float32 inside; the interpreter rounds what comes out to the type that the program declares.
Semantics: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MOVES = {
    "concat", "expand_dims", "gather", "reshape", "slice_by_size", "slice_update", "split", "transpose",
}  # fmt: skip
"""Operations that only move numbers, so that nothing is left to round."""


def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Rows of `x` along `axis`."""
    _only(batch_dims == 0, "gather with batch_dims")
    return np.take(x, indices, axis=int(axis))


def reshape(x: Array, shape: Array) -> Array:
    """`x` in another shape; 0 keeps the dimension at that place, -1 is what is left."""
    sizes = [x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)]
    return x.reshape(sizes)


def expand_dims(x: Array, axes: Array) -> Array:
    """New axes of size 1."""
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def transpose(x: Array, perm: Array) -> Array:
    """Axes in another order."""
    return x.transpose([int(axis) for axis in perm])


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    """Arrays joined along an axis."""
    _only(not interleave, "concat with interleave")
    return np.concatenate(values, axis=int(axis))


def split(
    x: Array, num_splits: int | None = None, split_sizes: Array | None = None, axis: int | None = None
) -> list[Array]:
    """Parts along an axis, equal or of the given sizes."""
    assert axis is not None
    if split_sizes is None:
        assert num_splits is not None
        return np.split(x, int(num_splits), axis=int(axis))
    return np.split(x, np.cumsum(split_sizes)[:-1], axis=int(axis))


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """A box of `x`; size -1 reaches to the end."""
    return x[tuple(slice(int(b), None if s == -1 else int(b) + int(s)) for b, s in zip(begin, size, strict=True))]


def slice_update(x: Array, update: Array, begin: Array, end: Array, in_place: bool = False, **unused: Any) -> Array:
    """`x` with a box replaced; the box must lie inside and have the shape of `update`."""
    _only(all(value is None for value in unused.values()), f"slice_update with {', '.join(unused)}")
    box = tuple(slice(int(b), int(e)) for b, e in zip(begin, end, strict=True))
    if any(s.start < 0 or s.stop > size for s, size in zip(box, x.shape, strict=True)):
        raise IndexError(f"slice_update writes {box}, outside {x.shape}")
    result = x if in_place else x.copy()
    if result[box].shape != update.shape:
        raise IndexError(f"slice_update writes {update.shape} into {result[box].shape}")
    result[box] = update
    return result


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: int = 1,
) -> Array:
    """A 1x1 convolution: one matrix product over the channels of (1, in, H, W)."""
    _only(weight.shape[2:] == (1, 1) and x.shape[0] == 1, "convolution other than 1x1 of one example")
    _only(groups == 1 and (strides is None or set(np.asarray(strides).tolist()) == {1}), "strided or grouped conv")
    _only(pad is None or not np.any(pad), "padded conv")
    product = weight[:, :, 0, 0] @ x.reshape(x.shape[1], -1)
    result = product.reshape(1, weight.shape[0], *x.shape[2:])
    return result if bias is None else result + bias.reshape(1, -1, 1, 1)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x weight' + bias."""
    result = x @ weight.T
    return result if bias is None else result + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Batched matrix product."""
    return (np.swapaxes(x, -1, -2) if transpose_x else x) @ (np.swapaxes(y, -1, -2) if transpose_y else y)


def layer_norm(
    x: Array, axes: Array | None = None, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over `axes`."""
    over = tuple(int(axis) % x.ndim for axis in (range(x.ndim) if axes is None else axes))
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    centred = x - x.mean(axis=over, keepdims=True)
    result = centred / np.sqrt(np.square(centred).mean(axis=over, keepdims=True) + np.float32(epsilon))
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def softmax(x: Array, axis: int = -1) -> Array:
    """exp(x) over its sum along an axis."""
    exponential = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return exponential / exponential.sum(axis=int(axis), keepdims=True)


def silu(x: Array) -> Array:
    """x sigmoid(x)."""
    return x / (1 + np.exp(-np.clip(x, -80, None)))


def reduce_sum(x: Array, axes: Array | None = None, keep_dims: bool = False) -> Array:
    """Sum over axes."""
    over = None if axes is None else tuple(int(axis) for axis in axes)
    return x.sum(axis=over, keepdims=bool(keep_dims), dtype=x.dtype)


def cast(x: Array, dtype: str) -> Array:
    """Another type; floats are float32 here and rounded by the interpreter."""
    kinds = {"fp16": np.float32, "fp32": np.float32, "bool": np.bool_}
    return x.astype(kinds.get(dtype, np.int32))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "cast": cast,
    "concat": concat,
    "conv": conv,
    "cos": lambda x: np.cos(x),
    "equal": lambda x, y: np.equal(x, y),
    "expand_dims": expand_dims,
    "gather": gather,
    "layer_norm": layer_norm,
    "less_equal": lambda x, y: np.less_equal(x, y),
    "linear": linear,
    "matmul": matmul,
    "mul": lambda x, y: x * y,
    "reduce_sum": reduce_sum,
    "reshape": reshape,
    "silu": silu,
    "sin": lambda x: np.sin(x),
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "softmax": softmax,
    "split": split,
    "sub": lambda x, y: x - y,
    "transpose": transpose,
}
"""By MIL name; states and constants are the interpreter's own affair."""


def decode_lut(indices: Array, lut: Array, vector_axis: Any = None) -> Array:
    """`constexpr_lut_to_dense`: the weight that indices [d1..dk] and tables [g1..gk, 2**bits, 1] say.

    Along axis i, g_i tables serve d_i / g_i consecutive entries each.
    """
    _only(lut.shape[-1] == 1, "vector palettization")
    rank = indices.ndim
    tables = np.arange(np.prod(lut.shape[:rank])).reshape(lut.shape[:rank])
    for axis in range(rank):
        tables = np.repeat(tables, indices.shape[axis] // lut.shape[axis], axis=axis)
    entries = lut.shape[-2]
    return lut.reshape(-1)[tables * entries + indices.astype(np.int64)]


def _only(supported: bool, what: str) -> None:
    if not supported:
        raise NotImplementedError(f"the interpreter has no {what}")
