"""Every operation of the interpreter against torch, through MIL programs of one operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from a1q.coreml.interpreter import Interpreter
from a1q.coreml.operations import OPERATIONS, decode_lut
from a1q.coreml.toolkit import coremltools

RNG = np.random.default_rng(0)
X = RNG.standard_normal((1, 6, 2, 8)).astype(np.float32)
Y = RNG.standard_normal((1, 6, 2, 8)).astype(np.float32)
ROWS = np.array([[4, 0, 2]], np.int32)
COUNTS = np.arange(12, dtype=np.int32).reshape(1, 1, 3, 4)
WEIGHT = RNG.standard_normal((5, 6, 1, 1)).astype(np.float32)
GAMMA = RNG.standard_normal(6).astype(np.float32)
TABLE = RNG.standard_normal((7, 8)).astype(np.float32)
tx, ty = torch.tensor(X), torch.tensor(Y)

CASES = {
    "add": (lambda mb, x, y: mb.add(x=x, y=y), [X, Y], tx + ty),
    "sub": (lambda mb, x, y: mb.sub(x=x, y=y), [X, Y], tx - ty),
    "mul": (lambda mb, x, y: mb.mul(x=x, y=y), [X, Y], tx * ty),
    "cos": (lambda mb, x: mb.cos(x=x), [X], tx.cos()),
    "sin": (lambda mb, x: mb.sin(x=x), [X], tx.sin()),
    "silu": (lambda mb, x: mb.silu(x=x), [X * 30], functional.silu(tx * 30)),
    "softmax": (lambda mb, x: mb.softmax(x=x, axis=-1), [X * 30], (tx * 30).softmax(-1)),
    "reduce_sum": (lambda mb, x: mb.reduce_sum(x=x, axes=[2], keep_dims=True), [X], tx.sum(2, keepdim=True)),
    "transpose": (lambda mb, x: mb.transpose(x=x, perm=[0, 3, 1, 2]), [X], tx.permute(0, 3, 1, 2)),
    "reshape": (lambda mb, x: mb.reshape(x=x, shape=[1, 3, -1]), [X], tx.reshape(1, 3, -1)),
    "expand_dims": (lambda mb, x: mb.expand_dims(x=x, axes=[1]), [X], tx.unsqueeze(1)),
    "concat": (lambda mb, x, y: mb.concat(values=[x, y], axis=1), [X, Y], torch.cat([tx, ty], 1)),
    "split": (lambda mb, x: mb.split(x=x, num_splits=2, axis=3)[1], [X], tx.chunk(2, 3)[1]),
    "slice_by_size": (
        lambda mb, x: mb.slice_by_size(x=x, begin=[0, 2, 0, 1], size=[1, 3, 2, -1]),
        [X],
        tx[:, 2:5, :, 1:],
    ),
    "gather": (
        lambda mb, i: mb.gather(x=TABLE, indices=i, axis=0, validate_indices=False),
        [ROWS],
        torch.tensor(TABLE)[torch.tensor(ROWS).long()],
    ),
    "linear": (
        lambda mb, x: mb.linear(x=x, weight=TABLE, bias=TABLE[:, 0].copy()),
        [X],
        functional.linear(tx, torch.tensor(TABLE), torch.tensor(TABLE[:, 0])),
    ),
    "conv": (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT, bias=GAMMA[:5].copy()),
        [X],
        functional.conv2d(tx, torch.tensor(WEIGHT), torch.tensor(GAMMA[:5])),
    ),
    "matmul": (lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True), [X, Y], tx @ ty.mT),
    "layer_norm": (
        lambda mb, x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA, beta=GAMMA * 2, epsilon=1e-3),
        [X],
        functional.layer_norm(
            tx.movedim(1, 3), [6], torch.tensor(GAMMA), torch.tensor(GAMMA) * 2, 1e-3
        ).movedim(3, 1),
    ),
    "equal": (lambda mb, i: mb.cast(x=mb.equal(x=i, y=np.int32(3)), dtype="fp32"), [COUNTS], torch.tensor(COUNTS) == 3),
    "less_equal": (
        lambda mb, i: mb.cast(x=mb.less_equal(x=i, y=np.int32(3)), dtype="fp32"),
        [COUNTS],
        torch.tensor(COUNTS) <= 3,
    ),
    "cast": (lambda mb, i: mb.cast(x=i, dtype="fp32"), [COUNTS], torch.tensor(COUNTS).float()),
    "slice_update": (
        lambda mb, x, y: mb.slice_update(
            x=x,
            update=mb.slice_by_size(x=y, begin=[0, 0, 0, 0], size=[1, 2, 2, 3]),
            begin=np.array([0, 1, 0, 4], np.int32),
            end=np.array([1, 3, 2, 7], np.int32),
        ),
        [X, Y],
        torch.slice_scatter(tx[:, 1:3], ty[:, :2, :, :3], 3, 4, 7),
    ),
}  # fmt: skip


def run(build, arrays, precision, half=False):
    """Build a program of one operation, with fp16 inputs if `half`, and interpret it."""
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types

    inputs = {}
    for name, array in zip("xy", arrays, strict=False):
        real = types.fp16 if half else types.fp32
        kind = types.int32 if array.dtype == np.int32 else real
        inputs[name] = Placeholder(sym_shape=array.shape, dtype=kind, name=name)
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        function.set_outputs([build(mb, *function.inputs.values())])
    program = Program()
    program.add_function("main", function)
    interpreter = Interpreter(program, precision)
    values = dict(zip("xy", arrays, strict=False))
    return next(iter(interpreter.run("main", values, {}).values()))


@pytest.mark.parametrize("name", CASES)
def test_operation_is_that_of_torch(name):
    build, arrays, expected = CASES[name]
    found = run(build, arrays, "fp32")
    if name == "slice_update":
        assert np.array_equal(found[:, [0, 3, 4, 5]], X[:, [0, 3, 4, 5]])
        found = found[:, 1:3]
    np.testing.assert_allclose(found, expected.float().numpy(), rtol=2e-6, atol=2e-6)


def test_every_operation_has_a_case():
    assert set(CASES) == set(OPERATIONS)


def test_fp16_rounds_each_result_once_and_sums_in_fp32():
    half = X.astype(np.float16).astype(np.float32)
    weight = WEIGHT.astype(np.float16)
    found = run(lambda mb, x: mb.conv(x=x, weight=weight), [half], "fp16", half=True)
    exact = functional.conv2d(torch.tensor(half).double(), torch.tensor(weight).double()).numpy()
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(found, exact.astype(np.float16).astype(np.float32), rtol=1e-3)
    assert (found == exact.astype(np.float16)).mean() > 0.99
    assert not np.array_equal(found, exact.astype(np.float32))


def test_fp16_overflow_is_infinite_and_noted():
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types

    inputs = {"x": Placeholder(sym_shape=(1, 2), dtype=types.fp16, name="x")}
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        function.set_outputs([mb.mul(x=function.inputs["x"], y=np.float16(2), name="double")])
    program = Program()
    program.add_function("main", function)
    values = {"x": np.array([[1, 40000]], np.float32)}
    half, single = Interpreter(program, "fp16"), Interpreter(program, "fp32")
    assert np.array_equal(half.run("main", values, {})["double"], [[2, np.inf]])
    assert half.overflows == {"double": 1}
    assert np.array_equal(single.run("main", values, {})["double"], [[2, 80000]])
    assert single.overflows == {}


def test_an_unknown_operation_is_named():
    with pytest.raises(NotImplementedError, match="no operation gelu"):
        run(lambda mb, x: mb.gelu(x=x), [X], "fp32")


def test_a_write_outside_the_cache_is_refused():
    begin, end = np.array([0, 0, 0, 6], np.int32), np.array([1, 6, 2, 14], np.int32)
    with pytest.raises(IndexError, match="outside"):
        OPERATIONS["slice_update"](x=X, update=Y, begin=begin, end=end)


@pytest.mark.parametrize("tables", [(1, 1), (3, 1), (6, 1), (3, 2)])
def test_decode_lut(tables):
    """Entry (i, j) comes from the table of its block of rows and of columns."""
    indices = RNG.integers(0, 4, (6, 4)).astype(np.uint8)
    lut = RNG.standard_normal((*tables, 4, 1)).astype(np.float16)
    decoded = decode_lut(indices, lut)
    for i in range(6):
        for j in range(4):
            assert decoded[i, j] == lut[i * tables[0] // 6, j * tables[1] // 4, indices[i, j], 0]
