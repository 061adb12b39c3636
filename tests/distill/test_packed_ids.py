import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from a1q.distill.packed_ids import WIDTHS, pack_ids, unpack_ids, upper_bits, upper_bytes


@given(st.data(), st.sampled_from([1, 2, 320, 65_536, 65_537, 131_072, 151_936, 262_145, 1 << 20, 1 << 24]))
def test_what_is_packed_is_unpacked(data, vocabulary):
    shape = data.draw(arrays.array_shapes(min_dims=1, max_dims=3, max_side=11))
    ids = data.draw(arrays.arrays(np.int64, shape, elements=st.integers(0, vocabulary - 1)))
    lower, upper = pack_ids(ids, vocabulary)
    assert (lower.dtype, upper.dtype) == (np.uint16, np.uint8)
    assert lower.shape == shape and upper.shape == (*shape[:-1], upper_bytes(vocabulary, shape[-1]))
    found = unpack_ids(lower, upper, vocabulary)
    assert found.dtype == np.int64 and (found == ids).all()


@given(st.integers(1, 1 << 24))
def test_the_upper_part_is_wide_enough_and_no_wider(vocabulary):
    width = upper_bits(vocabulary)
    assert vocabulary <= 1 << (16 + width)
    assert all(vocabulary > 1 << (16 + other) for other in WIDTHS if other < width)


def test_the_first_id_stands_lowest():
    lower, upper = pack_ids(np.array([0x10005, 0x20006, 0x30007, 8, 0x10009]), 151_936)
    assert lower.tolist() == [5, 6, 7, 8, 9]
    assert upper.tolist() == [0b00_11_10_01, 0b01]
    assert upper_bytes(151_936, 128) == 32


def test_more_than_24_bits_are_refused():
    with pytest.raises(ValueError, match="24 bits"):
        upper_bits((1 << 24) + 1)
