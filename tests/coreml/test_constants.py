"""Compressed constants against plain loops over their definition, and against coremltools' own decompression."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from a1q.coreml import constants
from a1q.coreml.constants import Constants, decode_blocks, decode_lut, unpack
from a1q.coreml.interpreter import Interpreter
from a1q.coreml.toolkit import coremltools
from tests.coreml.one_operation import program_of, run

RNG = np.random.default_rng(0)


@st.composite
def grouped(draw):
    """(shape, counts that divide it)."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    return tuple(count * draw(st.integers(1, 4)) for count in counts), tuple(counts)


@given(grouped(), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_each_number_comes_from_the_table_of_its_block(shapes, bits, seed):
    shape, counts = shapes
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 2**bits, shape).astype(np.uint8)
    lut = rng.standard_normal((*counts, 2**bits, 1)).astype(np.float16)
    decoded = decode_lut(indices, lut)
    assert decoded.shape == shape
    for place in np.ndindex(shape):
        table = tuple(p * count // size for p, count, size in zip(place, counts, shape, strict=True))
        assert decoded[place] == lut[(*table, indices[place], 0)]


@given(grouped(), st.booleans(), st.sampled_from([np.int8, np.uint8]), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_each_number_is_scaled_by_its_block(shapes, with_offset, kind, seed):
    shape, counts = shapes
    rng = np.random.default_rng(seed)
    data = rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, shape).astype(kind)
    scale = rng.standard_normal(counts).astype(np.float16)
    offset = rng.integers(0, 100, counts).astype(kind) if with_offset else None
    decoded = decode_blocks(data, scale, offset)
    assert decoded.dtype == np.float16
    for place in np.ndindex(shape):
        block = tuple(p * count // size for p, count, size in zip(place, counts, shape, strict=True))
        whole = int(data[place]) - (0 if offset is None else int(offset[block]))
        assert decoded[place] == np.float16(float(scale[block]) * whole)


def test_chunks_leave_no_seam(monkeypatch):
    indices = RNG.integers(0, 4, (7, 11)).astype(np.uint8)
    one, rows = RNG.standard_normal((1, 1, 4, 1)), RNG.standard_normal((7, 1, 4, 1))
    data, scale = RNG.integers(-9, 9, (7, 12)).astype(np.int8), RNG.standard_normal((7, 3)).astype(np.float32)
    whole = decode_lut(indices, one), decode_lut(indices, rows), decode_blocks(data, scale)
    for chunk in (1, 10, 25):
        monkeypatch.setattr(constants, "CHUNK", chunk)
        cut = decode_lut(indices, one), decode_lut(indices, rows), decode_blocks(data, scale)
        assert all(np.array_equal(a, b) for a, b in zip(whole, cut, strict=True))


@given(st.integers(1, 8), hnp.arrays(np.uint8, st.integers(0, 40)))
@settings(max_examples=60, deadline=None)
def test_unpacking(bits, numbers):
    numbers = numbers & (2**bits - 1)
    stream = "".join(f"{number:0{bits}b}"[::-1] for number in numbers.tolist())
    padded = stream + "0" * (-len(stream) % 8)
    packed = np.array([int(padded[i : i + 8][::-1], 2) for i in range(0, len(padded), 8)], np.uint8)
    assert np.array_equal(unpack(packed, bits, len(numbers)), numbers)


def numpy_type(name):
    coremltools()
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(name))


def lut_weight(mb, kind, vector=1, axis=None, tables=(2, 1)):
    bits = int(kind.removeprefix("uint"))
    indices = RNG.integers(0, 2**bits, (6, 8)).astype(numpy_type(kind))
    lut = RNG.standard_normal((*tables, 2**bits, vector)).astype(np.float32)
    return mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=axis)


def block_weight(mb, kind, offset, shape=(6, 2)):
    def draw(size):
        bits = int(kind.removeprefix("u").removeprefix("int"))
        low, high = (0, 2**bits) if kind.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        return RNG.integers(low, high, size).astype(numpy_type(kind))

    scale = RNG.standard_normal(shape).astype(np.float32)
    return mb.constexpr_blockwise_shift_scale(data=draw((6, 8)), scale=scale, offset=draw(shape) if offset else None)


FORMS = {
    **{f"lut {kind}": lambda mb, kind=kind: lut_weight(mb, kind) for kind in
       ("uint1", "uint2", "uint3", "uint4", "uint6", "uint8")},
    "lut by columns": lambda mb: lut_weight(mb, "uint2", tables=(3, 4)),
    "lut of vectors, axis 0": lambda mb: lut_weight(mb, "uint4", vector=2, axis=0),
    "lut of vectors, axis 1": lambda mb: lut_weight(mb, "uint4", vector=3, axis=1, tables=(2, 4)),
    **{f"blocks {kind}, offset {offset}": lambda mb, kind=kind, offset=offset: block_weight(mb, kind, offset)
       for kind, offset in itertools.product(("int4", "uint4", "int8", "uint8"), (False, True))},
    "one block": lambda mb: block_weight(mb, "int4", True, (1, 1)),
    "sparse": lambda mb: mb.constexpr_sparse_to_dense(
        nonzero_data=np.arange(1, 25, dtype=np.float32),
        mask=(np.arange(48).reshape(6, 8) % 2).astype(numpy_type("uint1")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_compressed_weights_are_those_of_coremltools(name):
    """Inside a program, against `materialized_val_inference`, which is coremltools' decompression."""
    wanted = []

    def build(mb, x):
        weight = FORMS[name](mb)
        wanted.append(weight.op.materialized_val_inference())
        return mb.add(x=mb.reduce_sum(x=x), y=weight)

    (found,) = run(build, [np.zeros(2, np.float32)])
    np.testing.assert_allclose(found, wanted[0], rtol=1e-6)


def test_tables_may_be_quantized_themselves():
    """int8 tables behind a scale, as joint compression makes them."""
    data = RNG.integers(-99, 99, (1, 1, 4, 1)).astype(np.int8)
    indices = RNG.integers(0, 4, (6, 8)).astype(np.uint8)

    def build(mb, x):
        lut = mb.constexpr_blockwise_shift_scale(data=data, scale=np.full((1, 1, 1, 1), 0.5, np.float32))
        weight = mb.constexpr_lut_to_dense(indices=indices.astype(numpy_type("uint2")), lut=lut)
        return mb.add(x=mb.reduce_sum(x=x), y=weight)

    (found,) = run(build, [np.zeros(2, np.float32)])
    assert np.array_equal(found, data.reshape(-1)[indices] * np.float32(0.5))


OLD = {
    "lut": lambda mb: mb.constexpr_lut_to_dense(
        lut=np.arange(4, dtype=np.float32) - 1.5,
        indices=RNG.integers(0, 256, 12).astype(np.uint8),
        shape=np.array([6, 8], np.uint32),
    ),
    "affine": lambda mb: mb.constexpr_affine_dequantize(
        quantized_data=RNG.integers(0, 256, (6, 8)).astype(np.uint8),
        zero_point=RNG.integers(0, 256, 8).astype(np.uint8),
        scale=RNG.standard_normal(8).astype(np.float32),
        axis=np.int32(1),
    ),
    "affine of one scale": lambda mb: mb.constexpr_affine_dequantize(
        quantized_data=RNG.integers(-128, 127, (6, 8)).astype(np.int8),
        zero_point=np.int8(-3),
        scale=np.float32(0.1),
        axis=np.int32(0),
    ),
    "cast": lambda mb: mb.constexpr_cast(
        source_val=RNG.standard_normal((6, 8)).astype(np.float16), output_dtype="fp32"
    ),
    "sparse": lambda mb: mb.constexpr_sparse_to_dense(
        nonzero_data=np.arange(1, 25, dtype=np.float32),
        mask=np.full(6, 0b01010101, np.uint8),
        shape=np.array([6, 8], np.uint32),
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_the_forms_of_ios16(name):
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types

    with Function({"x": Placeholder((2,), dtype=types.fp32)}, opset_version=ct.target.iOS16) as function:
        weight = OLD[name](mb)
        wanted = weight.op.materialized_val_inference()
        function.set_outputs([mb.add(x=mb.reduce_sum(x=function.inputs["x"]), y=weight)])
    program = Program()
    program.add_function("main", function)
    (found,) = Interpreter(program, "fp32").run("main", {"x": np.zeros(2, np.float32)}, {}).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_equal_constants_are_held_once():
    """By content, over functions, precisions and programs."""
    indices = RNG.integers(0, 4, (100, 64)).astype(numpy_type("uint2"))
    dense = RNG.standard_normal((100, 64)).astype(np.float16)

    def build(mb, x):
        weight = mb.constexpr_lut_to_dense(
            indices=indices.copy(), lut=np.arange(4, dtype=np.float16).reshape(1, 1, 4, 1), name="palette"
        )
        return mb.add(x=mb.add(x=x, y=weight), y=mb.const(val=dense.copy(), name="dense"))

    shared = Constants()
    found = [
        Interpreter(program_of(build, [np.zeros(64, np.float32)], half=True), precision, shared).constants["main"]
        for precision in ("fp32", "fp16")
    ]
    for name in ("palette", "dense"):
        assert found[0][name] is found[1][name]
        assert found[0][name].dtype == np.float32
    assert not np.array_equal(found[0]["palette"], found[0]["dense"])
