"""The constants of a package as dense arrays: compressed weights decoded, fp16 widened, nothing kept twice.

Formats: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html (`constexpr_*`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from a1q.coreml.movements import Array, supported

CHUNK = 1 << 16
"""Numbers decoded at once: their table positions (8 bytes each) stay in the processor's cache."""
SMALL = 4096
"""Bytes below which a constant isn't worth the search for an equal one."""


class Constants:
    """Dense arrays of constants, each made once for all functions, programs and precisions that ask here.

    Two constants are one if their bytes are: an interpreter in fp32 and one in fp16, or the functions of a package,
    share what they hold. Values are the same in both precisions: a weight that the package declares fp16 is rounded
    to fp16 as it is decoded.
    """

    def __init__(self) -> None:
        self._dense: dict[bytes, Any] = {}
        self._digests: dict[int, tuple[Any, bytes]] = {}
        """Digest of an array by its identity; the array is kept, so that its identity stays its own."""

    def value(self, op: Any) -> Any:
        """What a `const` or `constexpr_*` operation gives: a float32, int32 or bool array, a number, or a text.

        Raises:
            NotImplementedError: naming a compression that this module lacks.
        """
        if op.op_type == "const":
            raw = op.outputs[0].val
            if not isinstance(raw, np.ndarray) or raw.nbytes < SMALL:
                return widen(raw)
            return self._once(self._digest(raw), lambda: widen(raw))
        return self._once(self._key(op), lambda: widen(_compute(op)))

    def _once(self, key: bytes, make: Callable[[], Any]) -> Any:
        if key not in self._dense:
            self._dense[key] = make()
        return self._dense[key]

    def _key(self, op: Any) -> bytes:
        """Digest of a compressed constant: of its operation and everything that goes in."""
        digest = hashlib.sha256(op.op_type.encode())
        for name, var in sorted(op.inputs.items()):
            if var is not None:
                raw = var.val if var.op.op_type == "const" else None
                digest.update(name.encode() + (self._key(var.op) if raw is None else self._digest(np.asarray(raw))))
        return digest.digest()

    def _digest(self, array: Array) -> bytes:
        known = self._digests.get(id(array))
        if known is None:
            head = f"{array.dtype.str}{array.shape}".encode()
            known = array, hashlib.sha256(head + hashlib.sha256(np.ascontiguousarray(array).data).digest()).digest()
            if array.nbytes >= SMALL:
                self._digests[id(array)] = known
        return known[1]


def widen(value: Any) -> Any:
    """float16 as float32, integers as int32, scalars that aren't floats as Python's own."""
    if isinstance(value, str | bool | int | float):
        return value
    array = np.asarray(value)
    if array.ndim == 0 and not np.issubdtype(array.dtype, np.floating):
        return array.item()
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32, copy=False)
    return array.astype(np.int32, copy=False) if np.issubdtype(array.dtype, np.integer) else array


def decode_lut(indices: Array, lut: Array, vector_axis: int | None = None) -> Array:
    """`constexpr_lut_to_dense` of iOS 18: the weight that indices [d1..dk] and tables [g1..gk, 2**bits, v] say.

    Along axis i, g_i tables serve d_i / g_i consecutive entries each. An index stands for v numbers, which follow each
    other along `vector_axis`.
    """
    groups, (entries, size) = lut.shape[:-2], lut.shape[-2:]
    tables = np.arange(np.prod(groups, dtype=np.int64)).reshape(groups) * entries
    if size == 1:
        return _look_up(indices, tables, lut.reshape(-1))
    supported(vector_axis is not None, "vector palettization without vector_axis")
    axis = int(vector_axis or 0) % indices.ndim
    parts = [_look_up(indices, tables, np.ascontiguousarray(lut[..., part]).reshape(-1)) for part in range(size)]
    shape = [d * size if i == axis else d for i, d in enumerate(indices.shape)]
    return np.stack(parts, axis=axis + 1).reshape(shape)


def _look_up(indices: Array, tables: Array, numbers: Array) -> Array:
    """numbers[tables (of each block) + indices], in chunks; floats come out as float32."""
    if np.issubdtype(numbers.dtype, np.floating):
        numbers = numbers.astype(np.float32)
    result = np.empty(indices.shape, numbers.dtype)
    if tables.size == 1:  # any cut will do
        flat, into = np.ascontiguousarray(indices).reshape(-1), result.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            np.take(numbers, flat[start : start + CHUNK], out=into[start : start + CHUNK], mode="clip")
        return result
    blocks = [size // count for size, count in zip(indices.shape, tables.shape, strict=True)]
    rows = max(1, CHUNK // max(1, int(np.prod(indices.shape[1:]))))
    for start in range(0, indices.shape[0], rows):
        stop = min(start + rows, indices.shape[0])
        offset = tables[np.arange(start, stop) // blocks[0]]
        for axis in range(1, indices.ndim):
            if tables.shape[axis] > 1:
                offset = np.repeat(offset, blocks[axis], axis=axis)
        np.take(numbers, offset + indices[start:stop], out=result[start:stop], mode="clip")
    return result


def unpack(packed: Array, bits: int, count: int) -> Array:
    """`count` unsigned numbers of `bits` bits that lie in bytes one after the other, lowest bit first."""
    if bits == 8:
        return packed[:count]
    flat = np.unpackbits(packed, bitorder="little", count=count * bits).reshape(count, bits)
    return np.packbits(flat, axis=1, bitorder="little").reshape(-1)


def decode_packed_lut(indices: Array, lut: Array, shape: Array) -> Array:
    """`constexpr_lut_to_dense` of iOS 16: packed indices into one table."""
    sizes = [int(size) for size in shape]
    bits = int(lut.size).bit_length() - 1
    return _look_up(unpack(indices, bits, int(np.prod(sizes))), np.zeros(1, np.int64), lut).reshape(sizes)


def decode_affine(quantized_data: Array, zero_point: Array, scale: Array, axis: int) -> Array:
    """`constexpr_affine_dequantize`: scale * (data - zero point), one number or one per entry of `axis`."""
    shape = [size if i == int(axis) % quantized_data.ndim else 1 for i, size in enumerate(quantized_data.shape)]

    def along(parameter: Array) -> Array:
        return np.reshape(parameter, shape if np.size(parameter) > 1 else [1] * quantized_data.ndim)

    return decode_blocks(quantized_data, along(scale), along(zero_point))


def decode_blocks(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """`constexpr_blockwise_shift_scale`: scale * (data - offset), each serving a block, in the type of `scale`."""
    result = np.empty(data.shape, scale.dtype)
    blocks = [size // count for size, count in zip(data.shape, scale.shape, strict=True)]
    rows = max(1, CHUNK // max(1, int(np.prod(data.shape[1:]))))

    def spread(parameter: Array, start: int, stop: int) -> Array:
        part = parameter[np.arange(start, stop) // blocks[0]].astype(np.float32)
        for axis in range(1, data.ndim):
            if 1 < parameter.shape[axis] < data.shape[axis]:
                part = np.repeat(part, blocks[axis], axis=axis)
        return part

    with np.errstate(over="ignore"):
        for start in range(0, data.shape[0], rows):
            stop = min(start + rows, data.shape[0])
            numbers = data[start:stop].astype(np.float32)
            if offset is not None:
                numbers -= spread(offset, start, stop)
            result[start:stop] = numbers * spread(scale, start, stop)
    return result


def decode_sparse(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """`constexpr_sparse_to_dense`: numbers where `mask` has a 1, else 0; iOS 16 packs the mask and says `shape`."""
    if shape is not None:
        sizes = [int(size) for size in shape]
        mask = unpack(mask, 1, int(np.prod(sizes))).reshape(sizes)
    result = np.zeros(mask.shape, nonzero_data.dtype)
    result[mask != 0] = nonzero_data
    return result


def _compute(op: Any) -> Array:
    """The value of a `constexpr_*` operation in the type that the package declares."""
    inputs = {name: _raw(var) for name, var in op.inputs.items() if var is not None}
    if op.op_type not in DECODERS:
        raise NotImplementedError(f"the interpreter has no operation {op.op_type}")
    return DECODERS[op.op_type](**inputs)


def _raw(var: Any) -> Any:
    """An input of a compressed constant, which may be compressed itself."""
    return var.val if var.op.op_type == "const" else _compute(var.op)


def _decode_any_lut(indices: Array, lut: Array, shape: Array | None = None, vector_axis: int | None = None) -> Array:
    return decode_lut(indices, lut, vector_axis) if shape is None else decode_packed_lut(indices, lut, shape)


def _cast(source_val: Array, output_dtype: str) -> Array:
    return np.asarray(source_val, np.float32)


DECODERS: Mapping[str, Callable[..., Array]] = {
    "constexpr_affine_dequantize": decode_affine,
    "constexpr_blockwise_shift_scale": decode_blocks,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _decode_any_lut,
    "constexpr_sparse_to_dense": decode_sparse,
}
"""By MIL name."""
