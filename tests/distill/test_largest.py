import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.distill.largest import BLOCK, largest


@pytest.mark.parametrize(
    ("length", "count"), [(500, 64), (500, 1), (500, 500), (5000, 64), (5 * BLOCK + 7, 2), (4 * BLOCK, 1)]
)
def test_of_distinct_values_it_is_topk(length, count):
    values = torch.randperm(2 * 3 * length).reshape(2, 3, length).float()
    for found, wanted in zip(largest(values, count), torch.topk(values, count, dim=-1), strict=True):
        assert torch.equal(found, wanted)


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 12 * BLOCK),
    share=st.floats(0, 1),
    distinct=st.integers(1, 9),
    seed=st.integers(0, 1 << 30),
    infinite=st.booleans(),
)
def test_of_equal_values_the_first_come_first(length, share, distinct, seed, infinite):
    """Against a stable sort; few distinct values, so that ties stand everywhere, and zeros of both signs."""
    count = max(1, round(share * min(length, 40)))
    levels = np.array([-np.inf if infinite else -2.5, 0.0, -0.0, *range(1, 9)], np.float32)[: distinct + 2]
    values = np.random.default_rng(seed).choice(levels, (3, length))
    order = np.argsort(-values, axis=-1, kind="stable")[:, :count]
    top, places = largest(torch.from_numpy(values), count)
    assert places.dtype == torch.int64 and (places.numpy() == order).all()
    assert (top.numpy() == np.take_along_axis(values, order, -1)).all()


def test_a_wide_row_of_equal_values():
    top, places = largest(torch.ones(1, 151_936), 128)
    assert places.tolist() == [list(range(128))] and bool((top == 1).all())
