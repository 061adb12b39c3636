"""MIL operations that move numbers without changing them, in NumPy.

Results may be views of `x`: nothing but the interpreter's own `slice_update` writes into an array.
Semantics: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Entries of `x` along `axis`; the first `batch_dims` axes of `x` and `indices` go together.

    Raises:
        IndexError: if an index is outside, `validate_indices` or not.
    """
    axis, batch_dims = int(axis) % x.ndim, int(batch_dims)
    if batch_dims == 0:
        return np.take(x, indices, axis=axis)
    batch = x.shape[:batch_dims]
    rows = x.reshape(-1, *x.shape[batch_dims:])
    places = indices.reshape(-1, *indices.shape[batch_dims:])
    taken = [np.take(row, place, axis=axis - batch_dims) for row, place in zip(rows, places, strict=True)]
    return np.stack(taken).reshape(*batch, *taken[0].shape)


def gather_along_axis(x: Array, indices: Array, axis: int = 0, validate_indices: bool = False) -> Array:
    """x[..., indices[...], ...]: one index for each result, along `axis`."""
    axis = int(axis) % x.ndim
    shape = [indices.shape[axis] if i == axis else size for i, size in enumerate(x.shape)]
    return np.take_along_axis(x, np.broadcast_to(indices, shape).astype(np.int64), axis=axis)


def gather_nd(x: Array, indices: Array, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Slices of `x` at the points that the last axis of `indices` names."""
    supported(int(batch_dims) == 0, "gather_nd with batch_dims")
    return np.asarray(x[tuple(np.moveaxis(indices, -1, 0))])


def reshape(x: Array, shape: Array) -> Array:
    """`x` in another shape; 0 keeps the dimension at that place, -1 is what is left."""
    sizes = [x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)]
    return x.reshape(sizes)


def expand_dims(x: Array, axes: Array) -> Array:
    """New axes of size 1."""
    return np.expand_dims(x, _axes(axes))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Without axes of size 1."""
    return np.squeeze(x, None if axes is None else _axes(axes))


def transpose(x: Array, perm: Array) -> Array:
    """Axes in another order."""
    return np.transpose(x, _axes(perm))


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    """Arrays joined along an axis, alternating between them if `interleave`."""
    if not interleave:
        return np.concatenate(values, axis=int(axis))
    axis = int(axis) % values[0].ndim
    shape = list(values[0].shape)
    shape[axis] *= len(values)
    return np.stack(values, axis=axis + 1).reshape(shape)


def stack(values: Sequence[Array], axis: int) -> Array:
    """Arrays joined along a new axis."""
    return np.stack(values, axis=int(axis))


def tile(x: Array, reps: Array) -> Array:
    """`x` repeated along its axes."""
    return np.tile(x, _axes(reps))


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


def box_of(
    rank: int,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> tuple[slice | int, ...]:
    """The index that `slice_by_index` and `slice_update` mean."""

    def at(mask: Array | None, axis: int) -> bool:
        return mask is not None and bool(mask[axis])

    box: list[slice | int] = []
    for axis in range(rank):
        first = None if at(begin_mask, axis) else int(begin[axis])
        last = None if at(end_mask, axis) else int(end[axis])
        step = 1 if stride is None else int(stride[axis])
        box.append((first or 0) if at(squeeze_mask, axis) else slice(first, last, step))
    return tuple(box)


def slice_by_index(x: Array, begin: Array, end: Array, **masks: Any) -> Array:
    """x[begin:end:stride] on every axis; see `box_of`."""
    return np.asarray(x[box_of(x.ndim, begin, end, **masks)])


def slice_update(
    x: Array, update: Array, begin: Array, end: Array, in_place: Callable[[Array], bool] | None = None, **masks: Any
) -> Array:
    """`x` with a box replaced; the box must lie inside and have the shape of `update`.

    Args:
        in_place: asked whether this view of `x` may be overwritten; without it, `x` is copied.

    Raises:
        IndexError: if the box is outside or the shapes differ.
    """
    box = box_of(x.ndim, begin, end, **masks)
    target = x[box]
    if np.shape(target) != update.shape:
        raise IndexError(f"slice_update writes {update.shape} into {np.shape(target)}: a box outside {x.shape}?")
    result = x if in_place is not None and isinstance(target, np.ndarray) and in_place(target) else x.copy()
    result[box] = update
    return result


def reverse(x: Array, axes: Array | None = None) -> Array:
    """Axes backwards."""
    return np.flip(x, None if axes is None else _axes(axes))


def select(cond: Array, a: Array, b: Array) -> Array:
    """`a` where `cond` holds, else `b`."""
    return np.where(cond, a, b)


def supported(condition: bool, what: str) -> None:
    """Raises:
    NotImplementedError: naming what the interpreter lacks, unless `condition` holds.
    """
    if not condition:
        raise NotImplementedError(f"the interpreter has no {what}")


def _axes(numbers: Array) -> tuple[int, ...]:
    return tuple(int(number) for number in numbers)


MOVEMENTS: dict[str, Callable[..., Any]] = {
    "concat": concat,
    "expand_dims": expand_dims,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "identity": lambda x: x,
    "reshape": reshape,
    "reverse": reverse,
    "select": select,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
"""By MIL name. What comes out was in, so that nothing is left to round."""
