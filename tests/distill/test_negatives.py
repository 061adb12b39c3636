import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.distill.negatives import draw_offsets, offset_bytes, offsets_to_ids


@st.composite
def sizes(draw):
    vocabulary = draw(st.integers(2, 400))
    kept = draw(st.integers(1, vocabulary))
    count = draw(st.integers(0, vocabulary - kept))
    return vocabulary, kept, count


@settings(max_examples=60, deadline=None)
@given(sizes(), st.integers(0, 2**32))
def test_ids_are_outside_the_top_and_inside_the_vocabulary(size, seed):
    vocabulary, kept, count = size
    generator = torch.Generator().manual_seed(seed)
    top = torch.stack([torch.randperm(vocabulary, generator=generator)[:kept] for _ in range(3)])
    offsets = draw_offsets((3, count), vocabulary - kept, generator)
    ids = offsets_to_ids(offsets, top, vocabulary)
    assert ids.shape == (3, count)
    for row in range(3):
        assert set(ids[row].tolist()) <= set(range(vocabulary)) - set(top[row].tolist())
    if count:
        assert offsets.min() >= 0 and offsets.max() < 256 ** offset_bytes(vocabulary - kept, count)


def test_as_many_draws_as_ids_are_all_of_them():
    top = torch.tensor([[5, 0, 9]])
    offsets = draw_offsets((1, 7), 7, torch.Generator().manual_seed(3))
    assert offsets_to_ids(offsets, top, 10).tolist() == [[1, 2, 3, 4, 6, 7, 8]]


def test_every_id_of_the_rest_is_drawn_equally_often():
    vocabulary, kept, count, draws = 23, 3, 8, 40_000
    top = torch.tensor([[2, 21, 11]]).expand(draws, kept)
    offsets = draw_offsets((draws, count), vocabulary - kept, torch.Generator().manual_seed(0))
    found = torch.bincount(offsets_to_ids(offsets, top, vocabulary).flatten(), minlength=vocabulary)
    rest = [token for token in range(vocabulary) if token not in (2, 21, 11)]
    assert found[[2, 21, 11]].sum() == 0
    expected = draws * count / (vocabulary - kept)
    # Binomial at most: five standard deviations.
    assert (found[rest] - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize(("rest", "count", "size"), [(1984, 128, 1), (151_872, 128, 2), (2_000_000, 2, 4), (9, 0, 1)])
def test_offset_bytes(rest, count, size):
    assert offset_bytes(rest, count) == size
