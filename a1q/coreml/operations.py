"""MIL operations in NumPy: the ones that decoder packages are made of, on float32 arrays, integers and booleans.

Every function takes the operation's inputs by MIL name. Numbers are what the operation says mathematically, with
float32 inside; the interpreter rounds what comes out to the type that the program declares.
Semantics: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from a1q.coreml.movements import MOVEMENTS, Array, supported


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
    """A convolution whose kernel is one point: a matrix product over the channels of (N, in, ...)."""
    supported(set(weight.shape[2:]) == {1}, "convolution with a kernel larger than 1")
    supported(groups == 1 and (strides is None or set(np.asarray(strides).tolist()) == {1}), "strided or grouped conv")
    supported(pad is None or pad_type != "custom" or not np.any(pad), "padded conv")
    batch, channels = x.shape[:2]
    columns = x.reshape(channels, -1) if batch == 1 else x.reshape(batch, channels, -1)
    matrix = weight.reshape(weight.shape[:2])
    # One column: a dot product per row, which runs at the speed of memory. BLAS lets threads wait for each other in its
    # product of a matrix and a vector, which takes ten times as long where the processor has other work.
    product = np.vecdot(matrix, columns[:, 0]) if columns.shape == (channels, 1) else matrix @ columns
    result = product.reshape(batch, weight.shape[0], *x.shape[2:])
    return result if bias is None else result + bias.reshape(-1, *[1] * (x.ndim - 2))


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x weight' + bias."""
    result = x @ weight.T
    return result if bias is None else result + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Batched matrix product."""
    return (np.swapaxes(x, -1, -2) if transpose_x else x) @ (np.swapaxes(y, -1, -2) if transpose_y else y)


def einsum(values: Sequence[Array], equation: str) -> Array:
    """`nchw,nwhu->nchu` or `chw,whr->chr` in any letters, the only two that MIL has: a product per row h."""
    x, y = (np.moveaxis(value, -2, -3) for value in values)
    return np.moveaxis(x @ y, -3, -2)


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(query key' / sqrt(size) + mask) value; a boolean mask says who takes part."""
    scores = query @ np.swapaxes(key, -1, -2) * np.float32(query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == np.bool_ else scores + attn_mask
    return softmax(scores.astype(np.float32, copy=False)) @ value


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


def l2_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """x / sqrt(sum of squares + epsilon) over the last three axes."""
    return x / np.sqrt(np.square(x).sum(axis=(-3, -2, -1), keepdims=True) + np.float32(epsilon))


def softmax(x: Array, axis: int = -1) -> Array:
    """exp(x) over its sum along an axis."""
    exponential = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return exponential / exponential.sum(axis=int(axis), keepdims=True)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)); beyond -80, where exp would leave float32, its limit."""
    return 1 / (1 + np.exp(-np.maximum(x, np.float32(-80))))


def silu(x: Array) -> Array:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def erf(x: Array) -> Array:
    """The error function, which NumPy lacks."""
    import torch

    return np.asarray(torch.erf(torch.tensor(x)).numpy())


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """x times the normal distribution function, or one of its approximations by tanh and sigmoid."""
    if mode == "TANH_APPROXIMATION":
        return x * (np.float32(0.5) * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3))))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    return x * (np.float32(0.5) * (1 + erf(x * np.float32(0.5**0.5))))


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return np.logaddexp(x, np.float32(0))


def real_div(x: Array, y: Array) -> Array:
    """x / y; of integers, rounded towards 0."""
    quotient = np.true_divide(x, y)
    return np.trunc(quotient).astype(np.int32) if _integers(x) and _integers(y) else quotient


def reduce(of: Callable[..., Any]) -> Callable[..., Array]:
    """The MIL operation of a NumPy reduction."""

    def reduction(x: Array, axes: Array | None = None, keep_dims: bool = False) -> Array:
        over = None if axes is None else tuple(int(axis) for axis in axes)
        return np.asarray(of(x, axis=over, keepdims=bool(keep_dims)), dtype=x.dtype)

    return reduction


def reduce_argmax(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Array:
    """Where the first largest number stands."""
    return np.argmax(x, axis=int(axis), keepdims=bool(keep_dims)).astype(np.int32)


def reduce_argmin(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Array:
    """Where the first smallest number stands."""
    return np.argmin(x, axis=int(axis), keepdims=bool(keep_dims)).astype(np.int32)


def topk(
    x: Array,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> list[Array]:
    """The `k` largest numbers (smallest if `ascending`) in order, and their places."""
    order = np.argsort(x if ascending else -x, axis=int(axis), kind="stable")
    places = np.take(order, np.arange(int(k)), axis=int(axis))
    values = np.take_along_axis(x, places, axis=int(axis))
    return [values, places.astype(np.int32)] if return_indices else [values]


def cumsum(x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    """Running sum along an axis."""
    turned = np.flip(x, int(axis)) if reverse else x
    result = np.cumsum(turned, axis=int(axis), dtype=x.dtype)
    result = result - turned if exclusive else result
    return np.flip(result, int(axis)) if reverse else result


def band_part(x: Array, lower: int = -1, upper: int = -1) -> Array:
    """`x` with 0 outside a band around the diagonal; -1 keeps that whole side."""
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    inside = ((int(lower) < 0) | (rows - columns <= int(lower))) & ((int(upper) < 0) | (columns - rows <= int(upper)))
    return np.where(inside, x, np.zeros((), x.dtype))


def range_1d(end: Any, start: Any, step: Any) -> Array:
    """start, start + step, ... below `end`."""
    numbers = np.arange(start, end, step)
    return numbers.astype(np.int32 if _integers(numbers) else np.float32)


def fill(shape: Array, value: Any = 0.0) -> Array:
    """An array of one number."""
    return np.full([int(size) for size in shape], value, dtype=np.asarray(value).dtype)


def one_hot(indices: Array, one_hot_vector_size: int, axis: int = -1, on_value: Any = 1, off_value: Any = 0) -> Array:
    """`on_value` at each index along a new axis, `off_value` elsewhere."""
    places = np.arange(int(one_hot_vector_size))
    axis = int(axis) % (indices.ndim + 1)
    hit = np.expand_dims(indices, axis) == places.reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    return np.where(hit, on_value, off_value).astype(np.result_type(np.asarray(on_value)))


_COMBINE: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum,
}  # fmt: skip


def _scattered(data: Array, index: Any, updates: Array, mode: str) -> Array:
    result = data.copy()
    if mode == "update":
        result[index] = updates
    else:
        _COMBINE[mode].at(result, index, updates)
    return result


def scatter(
    data: Array, indices: Array, updates: Array, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Array:
    """`data` with `updates` combined into its entries `indices` along `axis`."""
    return _scattered(data, (slice(None),) * (int(axis) % data.ndim) + (indices,), updates, mode)


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Array:
    """`data` with every number of `updates` combined into the place its index names along `axis`."""
    index: list[Any] = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    index[int(axis) % data.ndim] = indices
    return _scattered(data, tuple(index), updates, mode)


def scatter_nd(data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: bool = False) -> Array:
    """`data` with `updates` combined into the points or slices that the last axis of `indices` names."""
    return _scattered(data, tuple(np.moveaxis(indices, -1, 0)), updates, mode)


def cast(x: Array, dtype: str) -> Array:
    """Another type; floats are float32 here and rounded by the interpreter, integers int32."""
    kinds = {"fp16": np.float32, "fp32": np.float32, "bool": np.bool_}
    return np.asarray(x).astype(kinds.get(dtype, np.int32))


def _integers(x: Any) -> bool:
    return np.issubdtype(np.asarray(x).dtype, np.integer)


def _shifted(x: Array, epsilon: float) -> Array:
    return x + np.float32(epsilon)


OPERATIONS: dict[str, Callable[..., Any]] = {
    **MOVEMENTS,
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "band_part": band_part,
    "cast": cast,
    "ceil": lambda x: np.ceil(x),
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "conv": conv,
    "cos": lambda x: np.cos(x),
    "cumsum": cumsum,
    "einsum": einsum,
    "equal": lambda x, y: np.equal(x, y),
    "erf": erf,
    "exp": lambda x: np.exp(x),
    "exp2": lambda x: np.exp2(x),
    "fill": fill,
    "floor": lambda x: np.floor(x),
    "floor_div": lambda x, y: np.floor_divide(x, y),
    "gelu": gelu,
    "greater": lambda x, y: np.greater(x, y),
    "greater_equal": lambda x, y: np.greater_equal(x, y),
    "inverse": lambda x, epsilon=1e-4: 1 / _shifted(x, epsilon),
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "less": lambda x, y: np.less(x, y),
    "less_equal": lambda x, y: np.less_equal(x, y),
    "linear": linear,
    "log": lambda x, epsilon=1e-45: np.log(_shifted(x, epsilon)),
    "logical_and": lambda x, y: np.logical_and(x, y),
    "logical_not": lambda x: np.logical_not(x),
    "logical_or": lambda x, y: np.logical_or(x, y),
    "logical_xor": lambda x, y: np.logical_xor(x, y),
    "matmul": matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "mod": lambda x, y: np.mod(x, y),
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: np.not_equal(x, y),
    "one_hot": one_hot,
    "pow": lambda x, y: np.power(x, y),
    "range_1d": range_1d,
    "real_div": real_div,
    "reduce_argmax": reduce_argmax,
    "reduce_argmin": reduce_argmin,
    "reduce_l2_norm": reduce(lambda x, **over: np.sqrt(np.square(x).sum(**over))),
    "reduce_max": reduce(np.max),
    "reduce_mean": reduce(np.mean),
    "reduce_min": reduce(np.min),
    "reduce_prod": reduce(np.prod),
    "reduce_sum": reduce(np.sum),
    "reduce_sum_square": reduce(lambda x, **over: np.square(x).sum(**over)),
    "relu": lambda x: np.maximum(x, 0),
    "round": lambda x: np.round(x),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(_shifted(x, epsilon)),
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "shape": lambda x: np.array(np.shape(x), np.int32),
    "sigmoid": sigmoid,
    "sign": lambda x: np.sign(x),
    "silu": silu,
    "sin": lambda x: np.sin(x),
    "softmax": softmax,
    "softplus": softplus,
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: np.square(x),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: np.tanh(x),
    "topk": topk,
}
"""By MIL name; states and constants are the interpreter's own affair."""
