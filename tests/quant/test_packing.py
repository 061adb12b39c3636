"""Packed indices against numpy's bit order, and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant.packing import WIDTHS, pack, packed_size, unpack


@settings(max_examples=150, deadline=None)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(0, 9), columns=st.integers(1, 17), seed=st.integers(0, 2**31))
def test_round_trip_and_bit_order(bits: int, rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    packed = pack(torch.from_numpy(values), bits)
    assert packed.numel() == packed_size(values.size, bits)
    stream = np.unpackbits(values.reshape(-1, 1), axis=1, bitorder="little")[:, :bits].reshape(-1)
    assert np.array_equal(packed.numpy(), np.packbits(stream, bitorder="little"))
    assert np.array_equal(unpack(packed, bits, values.shape).numpy(), values)


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit in 2 bits"):
        pack(torch.tensor([4], dtype=torch.uint8), 2)


def test_wrong_type_width_and_length_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.tensor([1]), 2)
    with pytest.raises(ValueError, match="one of 1, 2, 3, 4, 6, 8"):
        pack(torch.tensor([1], dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="can't hold 5 indices"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, (5,))


def test_padding_bits_must_be_zero() -> None:
    packed = pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 2)
    packed[-1] |= 0x80
    with pytest.raises(ValueError, match="padding"):
        unpack(packed, 2, (3,))
