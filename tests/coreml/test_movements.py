"""Every operation that moves numbers against torch, through MIL programs of one operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.coreml.movements import MOVEMENTS, box_of
from tests.coreml.one_operation import Case, check, run

RNG = np.random.default_rng(0)
X = RNG.standard_normal((1, 6, 2, 8)).astype(np.float32)
Y = RNG.standard_normal((1, 6, 2, 8)).astype(np.float32)
TABLE = RNG.standard_normal((7, 8)).astype(np.float32)
ROWS = np.array([[4, 0, 2]], np.int32)
PLACES = RNG.integers(0, 6, (1, 3, 2, 8)).astype(np.int32)
TRUE = X > 0
tx, ty = torch.tensor(X), torch.tensor(Y)

CASES: dict[str, Case] = {
    "concat": (lambda mb, x, y: mb.concat(values=[x, y], axis=1), [X, Y], torch.cat([tx, ty], 1)),
    "expand_dims": (lambda mb, x: mb.expand_dims(x=x, axes=[1, -1]), [X], tx.unsqueeze(1).unsqueeze(-1)),
    "gather": (
        lambda mb, i: mb.gather(x=TABLE, indices=i, axis=0, validate_indices=False),
        [ROWS],
        torch.tensor(TABLE)[torch.tensor(ROWS).long()],
    ),
    "gather_along_axis": (
        lambda mb, x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
        [X, PLACES],
        tx.gather(1, torch.tensor(PLACES).long()),
    ),
    "gather_nd": (
        lambda mb, x: mb.gather_nd(x=x, indices=np.array([[0, 3, 1], [0, 5, 0]], np.int32)),
        [X],
        torch.stack([tx[0, 3, 1], tx[0, 5, 0]]),
    ),
    "identity": (lambda mb, x: mb.identity(x=x), [X], tx),
    "reshape": (lambda mb, x: mb.reshape(x=x, shape=[1, 3, -1]), [X], tx.reshape(1, 3, -1)),
    "reverse": (lambda mb, x: mb.reverse(x=x, axes=[1, 3]), [X], tx.flip(1, 3)),
    "select": (
        lambda mb, c, x, y: mb.select(cond=c, a=x, b=y),
        [TRUE, X, Y],
        torch.where(torch.tensor(TRUE), tx, ty),
    ),
    "slice_by_index": (
        lambda mb, x: mb.slice_by_index(
            x=x, begin=[0, 5, 1, 7], end=[1, 0, 2, -8], stride=[1, -2, 1, 3], begin_mask=[True, False, False, True],
            end_mask=[True, True, False, True], squeeze_mask=[False, False, True, False],
        ),
        [X],
        tx.flip(1)[:, ::2, 1, ::3],
    ),
    "slice_by_size": (
        lambda mb, x: mb.slice_by_size(x=x, begin=[0, 2, 0, 1], size=[1, 3, 2, -1]), [X], tx[:, 2:5, :, 1:],
    ),
    "slice_update": (
        lambda mb, x, y: mb.slice_update(
            x=x,
            update=mb.slice_by_size(x=y, begin=[0, 0, 0, 0], size=[1, 2, 2, 3]),
            begin=np.array([0, 1, 9, 4], np.int32),
            end=np.array([9, 3, 2, 7], np.int32),
            begin_mask=[False, False, True, False],
            end_mask=[True, False, False, False],
        ),
        [X, Y],
        tx.slice_scatter(torch.slice_scatter(tx[:, 1:3], ty[:, :2, :, :3], 3, 4, 7), 1, 1, 3),
    ),
    "split": (lambda mb, x: mb.split(x=x, num_splits=2, axis=3), [X], tx.chunk(2, 3)),
    "squeeze": (lambda mb, x: mb.squeeze(x=x, axes=[0]), [X], tx.squeeze(0)),
    "stack": (lambda mb, x, y: mb.stack(values=[x, y], axis=2), [X, Y], torch.stack([tx, ty], 2)),
    "tile": (lambda mb, x: mb.tile(x=x, reps=[1, 2, 1, 3]), [X], tx.tile(1, 2, 1, 3)),
    "transpose": (lambda mb, x: mb.transpose(x=x, perm=[0, 3, 1, 2]), [X], tx.permute(0, 3, 1, 2)),
}  # fmt: skip

OTHERS: dict[str, Case] = {
    "concat interleaved": (
        lambda mb, x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        [X, Y],
        torch.stack([tx, ty], 2).reshape(1, 12, 2, 8),
    ),
    "gather with batch_dims": (
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
        [RNG.standard_normal((3, 2, 5, 4)).astype(np.float32), RNG.integers(0, 5, (3, 6)).astype(np.int32)],
        None,
    ),
    "reshape keeping a dimension": (lambda mb, x: mb.reshape(x=x, shape=[0, -1, 8]), [X], tx.reshape(1, 12, 8)),
    "split in sizes": (lambda mb, x: mb.split(x=x, split_sizes=[1, 5], axis=1), [X], tx.split([1, 5], 1)),
    "squeeze everything": (lambda mb, x: mb.squeeze(x=x), [X[:, :1]], tx[0, 0]),
}
_, (many, places), _ = OTHERS["gather with batch_dims"]
OTHERS["gather with batch_dims"] = (
    OTHERS["gather with batch_dims"][0],
    [many, places],
    torch.stack([torch.tensor(rows)[:, torch.tensor(row).long()] for rows, row in zip(many, places, strict=True)]),
)


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_movement_is_that_of_torch(name):
    check({**CASES, **OTHERS}[name], rtol=0, atol=0)


def test_every_movement_has_a_case():
    assert set(CASES) == set(MOVEMENTS)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_box_is_that_of_torch(data):
    """Any begin, end and mask, against torch's indexing."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    x = np.arange(np.prod(shape)).reshape(shape)
    rank = len(shape)
    begin = [data.draw(st.integers(-size, size - 1)) for size in shape]
    end = [data.draw(st.integers(-size, size)) for size in shape]
    stride = [data.draw(st.integers(1, 3)) for _ in shape]
    masks = [data.draw(st.lists(st.booleans(), min_size=rank, max_size=rank)) for _ in range(3)]
    expected = torch.tensor(x)
    for axis in reversed(range(rank)):
        no_begin, no_end, squeezed = (mask[axis] for mask in masks)
        first = 0 if no_begin else begin[axis] % shape[axis]
        if squeezed:
            expected = expected.select(axis, first)
        else:
            last = shape[axis] if no_end else end[axis] + (shape[axis] if end[axis] < 0 else 0)
            kept = torch.arange(first, max(first, last), stride[axis])
            expected = expected.index_select(axis, kept)
    found = x[box_of(rank, np.array(begin), np.array(end), np.array(stride), *map(np.array, masks))]
    assert np.array_equal(found, expected.numpy())


def test_moving_does_not_round():
    """1 + 2**-20 isn't an fp16 number; an fp16 program that only moves it can't have computed it."""
    value = np.full((1, 2), 1 + 2.0**-20, np.float32)
    assert run(lambda mb, x: mb.transpose(x=x, perm=[1, 0]), [value], "fp16")[0][0, 0] == value[0, 0]


def test_a_write_outside_the_cache_is_refused():
    begin, end = np.array([0, 0, 0, 6], np.int32), np.array([1, 6, 2, 14], np.int32)
    with pytest.raises(IndexError, match="outside"):
        MOVEMENTS["slice_update"](x=X, update=Y, begin=begin, end=end)
