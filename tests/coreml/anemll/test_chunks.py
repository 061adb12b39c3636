from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.coreml.anemll.chunks import MAX_PART_BYTES, even_chunks, fitting_chunks


@given(st.integers(1, 100), st.data())
def test_even_chunks_cover_all_layers_and_differ_by_one_at_most(layers, data):
    chunks = data.draw(st.integers(1, layers))
    borders = even_chunks(layers, chunks)
    sizes = [end - begin for begin, end in borders]
    assert [layer for begin, end in borders for layer in range(begin, end)] == list(range(layers))
    assert len(borders) == chunks and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("sizes", "limit", "chunks"),
    [([10] * 4, 40, 1), ([10] * 4, 39, 2), ([10] * 4, 20, 2), ([10] * 4, 19, 4), ([10] * 4, 1, 4), ([5], 1, 1)],
)
def test_the_fewest_chunks_that_fit(sizes, limit, chunks):
    assert len(fitting_chunks(sizes, limit)) == chunks


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 300))
def test_no_chunk_is_over_the_limit_unless_a_single_layer_is(sizes, limit):
    borders = fitting_chunks(sizes, limit)
    over = [1 for begin, end in borders if sum(sizes[begin:end]) > limit]
    assert not over or len(borders) == len(sizes)
    if len(borders) > 1:
        fewer = even_chunks(len(sizes), len(borders) - 1)
        assert any(sum(sizes[begin:end]) > limit for begin, end in fewer)


def test_the_limit_is_that_of_anemll():
    layer = MAX_PART_BYTES // 28
    assert len(fitting_chunks([layer] * 28)) == 1
    assert len(fitting_chunks([layer + 1] * 28)) == 2
