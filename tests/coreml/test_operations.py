"""Every operation of the interpreter against torch, through MIL programs of one operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from a1q.coreml.movements import MOVEMENTS
from a1q.coreml.operations import OPERATIONS
from tests.coreml.one_operation import Case, check, run

RNG = np.random.default_rng(0)
X = RNG.standard_normal((1, 6, 2, 8)).astype(np.float32)
Y = RNG.standard_normal((1, 6, 2, 8)).astype(np.float32)
POSITIVE = np.abs(Y) + np.float32(0.1)
COUNTS = np.arange(-4, 8, dtype=np.int32).reshape(1, 1, 3, 4)
STEPS = np.array([3, -2, 4, 5], np.int32)
WEIGHT = RNG.standard_normal((5, 6, 1, 1)).astype(np.float32)
GAMMA = RNG.standard_normal(6).astype(np.float32)
TABLE = RNG.standard_normal((7, 8)).astype(np.float32)
SPOTS = np.array([4, 1], np.int32)
NEWS = RNG.standard_normal((1, 2, 2, 8)).astype(np.float32)
ALONG = np.stack([RNG.permutation(6)[:2] for _ in range(16)], 1).reshape(1, 2, 2, 8).astype(np.int32)
tx, ty, tp, tc = torch.tensor(X), torch.tensor(Y), torch.tensor(POSITIVE), torch.tensor(COUNTS)
table, news = torch.tensor(TABLE), torch.tensor(NEWS)


def unary(name, of, x=X, **options) -> Case:
    return lambda mb, x: getattr(mb, name)(x=x, **options), [x], of(torch.tensor(x))


def binary(name, of, x=X, y=Y) -> Case:
    return lambda mb, x, y: getattr(mb, name)(x=x, y=y), [x, y], of(torch.tensor(x), torch.tensor(y))


def compare(name, of) -> Case:
    return (
        lambda mb, i: mb.cast(x=getattr(mb, name)(x=i, y=np.int32(3)), dtype="fp32"),
        [COUNTS],
        of(tc, torch.tensor(3)).float(),
    )


def logical(name, of) -> Case:
    return (
        lambda mb, x, y: mb.cast(x=getattr(mb, name)(x=x, y=y), dtype="int32"),
        [X > 0, Y > 0],
        of(tx > 0, ty > 0).int(),
    )


def scattered(expected, spots, values, mode):
    """Scatter in a plain loop over pairs of places and updates."""
    for place, value in zip(spots, values, strict=True):
        expected[:, place] = {"update": value, "add": expected[:, place] + value}[mode]
    return expected


CASES: dict[str, Case] = {
    "abs": unary("abs", torch.abs),
    "add": binary("add", torch.add),
    "band_part": unary("band_part", lambda x: x.triu(-1).tril(3), lower=1, upper=3),
    "cast": (lambda mb, i: mb.cast(x=i, dtype="fp32"), [COUNTS], tc.float()),
    "ceil": unary("ceil", torch.ceil),
    "clip": unary("clip", lambda x: x.clamp(-0.5, 1), alpha=np.float32(-0.5), beta=np.float32(1)),
    "conv": (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT, bias=GAMMA[:5].copy()),
        [X],
        functional.conv2d(tx, torch.tensor(WEIGHT), torch.tensor(GAMMA[:5])),
    ),
    "cos": unary("cos", torch.cos),
    "cumsum": unary("cumsum", lambda x: x.cumsum(3), axis=3),
    "einsum": (
        lambda mb, x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        [X, Y.transpose(0, 3, 2, 1).copy()],
        torch.einsum("nchw,nwhu->nchu", tx, ty.permute(0, 3, 2, 1)),
    ),
    "equal": compare("equal", torch.eq),
    "erf": unary("erf", torch.special.erf),
    "exp": unary("exp", torch.exp),
    "exp2": unary("exp2", torch.exp2),
    "fill": (lambda mb, x: mb.fill(shape=mb.shape(x=x), value=2.5), [X], torch.full((1, 6, 2, 8), 2.5)),
    "floor": unary("floor", torch.floor),
    "floor_div": binary("floor_div", lambda x, y: torch.div(x, y, rounding_mode="floor"), COUNTS, STEPS),
    "gelu": unary("gelu", functional.gelu, X * 3, mode="EXACT"),
    "greater": compare("greater", torch.gt),
    "greater_equal": compare("greater_equal", torch.ge),
    "inverse": unary("inverse", lambda x: 1 / (x + 0.25), POSITIVE, epsilon=np.float32(0.25)),
    "l2_norm": unary("l2_norm", lambda x: x / (x.square().sum((1, 2, 3), True) + 0.5).sqrt(), epsilon=np.float32(0.5)),
    "layer_norm": (
        lambda mb, x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA, beta=GAMMA * 2, epsilon=np.float32(1e-3)),
        [X],
        functional.layer_norm(
            tx.movedim(1, 3), [6], torch.tensor(GAMMA), torch.tensor(GAMMA) * 2, 1e-3
        ).movedim(3, 1),
    ),
    "less": compare("less", torch.lt),
    "less_equal": compare("less_equal", torch.le),
    "linear": (
        lambda mb, x: mb.linear(x=x, weight=TABLE, bias=TABLE[:, 0].copy()),
        [X],
        functional.linear(tx, table, table[:, 0]),
    ),
    "log": unary("log", lambda x: (x + 0.5).log(), POSITIVE, epsilon=np.float32(0.5)),
    "logical_and": logical("logical_and", torch.logical_and),
    "logical_not": (lambda mb, x: mb.cast(x=mb.logical_not(x=x), dtype="int32"), [X > 0], (tx <= 0).int()),
    "logical_or": logical("logical_or", torch.logical_or),
    "logical_xor": logical("logical_xor", torch.logical_xor),
    "matmul": (lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True), [X, Y], tx @ ty.mT),
    "maximum": binary("maximum", torch.maximum),
    "minimum": binary("minimum", torch.minimum),
    "mod": binary("mod", torch.remainder, COUNTS, STEPS),
    "mul": binary("mul", torch.mul),
    "not_equal": compare("not_equal", torch.ne),
    "one_hot": (
        lambda mb, i: mb.one_hot(indices=i, one_hot_vector_size=6, axis=1, on_value=1, off_value=0),
        [SPOTS],
        functional.one_hot(torch.tensor(SPOTS).long(), 6),
    ),
    "pow": binary("pow", torch.pow, POSITIVE),
    "range_1d": (
        lambda mb, i: mb.range_1d(start=np.int32(1), end=mb.squeeze(x=i), step=np.int32(3)),
        [np.array([11], np.int32)],
        torch.arange(1, 11, 3),
    ),
    "real_div": binary("real_div", torch.div, X, POSITIVE),
    "reduce_argmax": unary("reduce_argmax", lambda x: x.argmax(1), axis=1, keep_dims=False),
    "reduce_argmin": unary("reduce_argmin", lambda x: x.argmin(1, keepdim=True), axis=1, keep_dims=True),
    "reduce_l2_norm": unary("reduce_l2_norm", lambda x: x.norm(dim=(1, 3)), axes=[1, 3], keep_dims=False),
    "reduce_max": unary("reduce_max", lambda x: x.amax((1, 2)), axes=[1, 2], keep_dims=False),
    "reduce_mean": unary("reduce_mean", lambda x: x.mean((1, 2), True), axes=[1, 2], keep_dims=True),
    "reduce_min": unary("reduce_min", lambda x: x.amin((2, 3)), axes=[-1, 2], keep_dims=False),
    "reduce_prod": unary("reduce_prod", lambda x: x.prod(1), axes=[1], keep_dims=False),
    "reduce_sum": unary("reduce_sum", lambda x: x.sum(2, keepdim=True), axes=[2], keep_dims=True),
    "reduce_sum_square": unary("reduce_sum_square", lambda x: x.square().sum(2), axes=[2], keep_dims=False),
    "relu": unary("relu", torch.relu),
    "round": unary("round", torch.round, X * 2),
    "rsqrt": unary("rsqrt", lambda x: (x + 0.5).rsqrt(), POSITIVE, epsilon=np.float32(0.5)),
    "scaled_dot_product_attention": (
        lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=X[0, 0] > -0.3),
        [X.reshape(1, 6, 2, 8), RNG.standard_normal((1, 6, 8, 8)).astype(np.float32), np.tile(Y, (1, 1, 4, 1))],
        None,
    ),
    "scatter": (
        lambda mb, x, n: mb.scatter(data=x, indices=SPOTS, updates=n, axis=1, mode="update"),
        [X, NEWS],
        scattered(tx.clone(), SPOTS.tolist(), news.unbind(1), "update"),
    ),
    "scatter_along_axis": (
        lambda mb, x, i, n: mb.scatter_along_axis(data=x, indices=i, updates=n, axis=1, mode="update"),
        [X, ALONG, NEWS],
        tx.scatter(1, torch.tensor(ALONG).long(), news),
    ),
    "scatter_nd": (
        lambda mb, x, n: mb.scatter_nd(data=x, indices=np.array([[0, 3], [0, 3]], np.int32), updates=n, mode="add"),
        [X, NEWS[0]],
        scattered(tx.clone(), [3, 3], news[0], "add"),
    ),
    "shape": (lambda mb, x: mb.shape(x=x), [X], torch.tensor([1, 6, 2, 8])),
    "sigmoid": unary("sigmoid", torch.sigmoid, X * 30),
    "sign": unary("sign", torch.sign),
    "silu": unary("silu", functional.silu, X * 30),
    "sin": unary("sin", torch.sin),
    "softmax": unary("softmax", lambda x: x.softmax(-1), X * 30, axis=-1),
    "softplus": unary("softplus", functional.softplus, X * 9),
    "sqrt": unary("sqrt", torch.sqrt, POSITIVE),
    "square": unary("square", torch.square),
    "sub": binary("sub", torch.sub),
    "tanh": unary("tanh", torch.tanh),
    "topk": unary("topk", lambda x: tuple(x.topk(3, 1)), k=3, axis=1),
}  # fmt: skip
_build, _qkv, _ = CASES["scaled_dot_product_attention"]
_reference = functional.scaled_dot_product_attention(*map(torch.tensor, _qkv), attn_mask=torch.tensor(X[0, 0] > -0.3))
CASES["scaled_dot_product_attention"] = _build, _qkv, _reference

OTHERS: dict[str, Case] = {
    "cast to a narrow integer": (lambda mb, x: mb.cast(x=x, dtype="int16"), [X * 9], (tx * 9).int()),
    "cast to bool": (
        lambda mb, i: mb.cast(x=mb.cast(x=i, dtype="bool"), dtype="fp32"), [COUNTS], tc.bool().float(),
    ),
    "conv of two examples": (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT),
        [np.concatenate([X, Y])],
        functional.conv2d(torch.cat([tx, ty]), torch.tensor(WEIGHT)),
    ),
    "conv in one dimension": (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT[..., 0]),
        [X[:, :, 0]],
        functional.conv1d(tx[:, :, 0], torch.tensor(WEIGHT[..., 0])),
    ),
    "cumsum backwards, exclusive": unary(
        "cumsum", lambda x: x.flip(1).cumsum(1).flip(1) - x, axis=1, exclusive=True, reverse=True
    ),
    "einsum of rank 3": (
        lambda mb, x, y: mb.einsum(values=(x, y), equation="chw,whr->chr"),
        [X[0], Y[0].transpose(2, 1, 0).copy()],
        torch.einsum("chw,whr->chr", tx[0], ty[0].permute(2, 1, 0)),
    ),
    "einsum that broadcasts": (
        lambda mb, x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        [X, Y.transpose(0, 3, 2, 1)[:, :, :1].copy()],
        torch.einsum("nchw,nwu->nchu", tx, ty.permute(0, 3, 2, 1)[:, :, 0]),
    ),
    "gelu by tanh": unary("gelu", lambda x: functional.gelu(x, approximate="tanh"), X * 3, mode="TANH_APPROXIMATION"),
    "gelu by sigmoid": unary("gelu", lambda x: x * (1.702 * x).sigmoid(), X * 3, mode="SIGMOID_APPROXIMATION"),
    "layer_norm alone": unary(
        "layer_norm", lambda x: functional.layer_norm(x, [2, 8], eps=1e-3), axes=[2, 3], epsilon=np.float32(1e-3)
    ),
    "linear of rank 2": (lambda mb, x: mb.linear(x=x, weight=TABLE), [X[0, 0]], functional.linear(tx[0, 0], table)),
    "matmul turned": (lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True), [X, Y], tx.mT @ ty),
    "real_div of integers": binary("real_div", lambda x, y: torch.div(x, y, rounding_mode="trunc"), COUNTS, STEPS),
    "reduce everything": unary("reduce_max", lambda x: x.amax(), keep_dims=False),
    "scaled_dot_product_attention with numbers": (
        lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=X[0, 0] * 3),
        _qkv,
        functional.scaled_dot_product_attention(*map(torch.tensor, _qkv), attn_mask=tx[0, 0] * 3),
    ),
    "scaled_dot_product_attention without a mask": (
        lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        _qkv,
        functional.scaled_dot_product_attention(*map(torch.tensor, _qkv)),
    ),
    "scatter that adds": (
        lambda mb, x, n: mb.scatter(data=x, indices=np.array([2, 2], np.int32), updates=n, axis=1, mode="add"),
        [X, NEWS],
        scattered(tx.clone(), [2, 2], news.unbind(1), "add"),
    ),
    "topk smallest": unary("topk", lambda x: tuple(x.topk(2, 3, largest=False)), k=2, axis=3, ascending=True),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_operation_is_that_of_torch(name):
    check({**CASES, **OTHERS}[name])


def test_every_operation_has_a_case():
    assert set(CASES) == set(OPERATIONS) - set(MOVEMENTS)


HAVE_CONSTANTS = {
    "cast", "clip", "conv", "fill", "gelu", "inverse", "l2_norm", "layer_norm", "linear", "log", "rsqrt",
    "scaled_dot_product_attention", "scatter", "scatter_nd",
}  # fmt: skip
ROUNDED = [
    name
    for name, (_, arrays, expected) in CASES.items()
    if name not in HAVE_CONSTANTS
    and all(array.dtype == np.float32 for array in arrays)
    and isinstance(expected, torch.Tensor)
    and expected.is_floating_point()
]
"""Cases without fp32 constants, which can be built in fp16 as they are."""


@pytest.mark.parametrize("name", ROUNDED)
def test_fp16_rounds_each_result_once(name):
    """What comes out is the fp16 number next to what float32 says of the fp16 inputs."""
    build, arrays, _ = CASES[name]
    halves = [array.astype(np.float16).astype(np.float32) for array in arrays]
    (exact,) = run(build, halves, "fp32")
    (found,) = run(build, halves, "fp16", half=True)
    assert np.array_equal(found, exact.astype(np.float16).astype(np.float32))


def test_fp16_sums_in_fp32():
    half = X.astype(np.float16).astype(np.float32)
    weight = WEIGHT.astype(np.float16)
    (found,) = run(lambda mb, x: mb.conv(x=x, weight=weight), [half], "fp16", half=True)
    exact = functional.conv2d(torch.tensor(half).double(), torch.tensor(weight).double()).numpy()
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32))
    assert (found == exact.astype(np.float16)).mean() > 0.99
    assert not np.array_equal(found, exact.astype(np.float32))


@pytest.mark.parametrize("size", [300.0, 20000.0, 65504.0])
def test_layer_norm_and_softmax_stay_inside_in_fp16(size):
    """Squares and exponentials of large fp16 numbers leave fp16; inside these operations they are fp32."""
    large = (X / np.abs(X).max() * size).astype(np.float16).astype(np.float32)
    (normed,) = run(lambda mb, x: mb.layer_norm(x=x, axes=[3], epsilon=np.float16(1e-3)), [large], "fp16", half=True)
    expected = functional.layer_norm(torch.tensor(large), [8], eps=float(np.float16(1e-3)))
    np.testing.assert_allclose(normed, expected, rtol=1e-3, atol=1e-3)
    (weights,) = run(lambda mb, x: mb.softmax(x=x, axis=3), [large], "fp16", half=True)
    np.testing.assert_allclose(weights, torch.tensor(large).softmax(3), rtol=1e-3, atol=1e-4)


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    inner=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_products_of_any_shape(shape, inner, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*shape, inner)).astype(np.float32)
    y = rng.standard_normal((*shape[:-1], inner, 3)).astype(np.float32)
    expected = torch.tensor(x) @ torch.tensor(y)
    np.testing.assert_allclose(OPERATIONS["matmul"](x, y), expected, rtol=1e-5, atol=1e-5)
    turned = OPERATIONS["matmul"](x, y.swapaxes(-1, -2), transpose_y=True)
    np.testing.assert_allclose(turned, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda mb, x: mb.sinh(x=x), "no operation sinh"),
        (lambda mb, x: mb.conv(x=x, weight=np.zeros((5, 6, 2, 2), np.float32)), "kernel larger than 1"),
        (lambda mb, x: mb.conv(x=x, weight=np.zeros((6, 1, 1, 1), np.float32), groups=6), "grouped"),
    ],
)
def test_what_is_missing_is_named(build, message):
    with pytest.raises(NotImplementedError, match=message):
        run(build, [X])
