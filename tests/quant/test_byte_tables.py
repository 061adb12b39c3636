"""Tables and rows as bytes: what is exact, what is near, and that the error told is the error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant.byte_tables import TWO_BYTES, WITHOUT, ByteTables, byte_tables, two_bytes


def said(found: ByteTables) -> torch.Tensor:
    return found.scale[:, None] * (found.codes.double() + found.offset[:, None])


@settings(deadline=None)
@given(
    entries=st.sampled_from([2, 3, 4, 8, 16, 64, 256]),
    low=st.floats(-3, 3),
    step=st.floats(1e-4, 2),
    down=st.booleans(),
)
def test_evenly_spaced_tables_are_exact_but_for_an_offset_too_small_to_add(
    entries: int, low: float, step: float, down: bool
) -> None:
    table = (low + step * torch.arange(entries, dtype=torch.float64))[None]
    table = table.flip(1) if down else table
    found = byte_tables(table)
    assert float(found.error) < (1e-9 if float(found.offset) else WITHOUT)
    torch.testing.assert_close(said(found), table, rtol=0, atol=1e-9 + float(found.error) * float(table.norm()))


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=16), st.integers(0, 3))
def test_the_error_told_is_the_error(entries: list[float], more: int) -> None:
    tables = torch.tensor([entries, entries[::-1], [0.5 * entry + more for entry in entries]])
    found, exact = byte_tables(tables), tables.double()
    missed = (said(found) - exact).square().mean(1).sqrt()
    size = exact.square().mean(1).sqrt()
    torch.testing.assert_close(found.error * size, missed, rtol=1e-6, atol=1e-12)
    assert float(found.error.max()) < 0.02  # no worse than rounding to a byte
    assert found.codes.dtype == torch.int8


def test_tables_of_four_lie_near_and_symmetric_ones_need_no_offset() -> None:
    tables = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    assert float(byte_tables(tables).error.quantile(0.99)) < 1.5e-3
    found = byte_tables(torch.tensor([[-1.5, -0.5, 0.5, 1.5], [-7.0, -1.0, 1.0, 7.0]]))
    assert float(found.offset.abs().max()) == 0
    assert float(found.error.max()) < 1e-9


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_tables_of_one_number_among_others(value: float) -> None:
    tables = torch.tensor([[value] * 4, [0.1, 0.4, 0.8, 1.6]])
    torch.testing.assert_close(said(byte_tables(tables))[0], tables[0].double(), rtol=1e-12, atol=0)


def test_uneven_tables_of_many_entries_are_told_to_be_far() -> None:
    assert float(byte_tables(torch.randn(1, 64, generator=torch.Generator().manual_seed(0))).error) > 1e-3


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 100), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
def test_two_bytes_round_to_whole_multiples(rows: int, columns: int, seed: int, size: float) -> None:
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    numbers[0] = 0
    octets, scales = two_bytes(numbers)
    assert octets.dtype == torch.int8
    again = (octets.double() * scales[..., None]).sum(0)
    step = numbers.double().abs().amax(1, keepdim=True) / TWO_BYTES
    assert bool(((again - numbers.double()).abs() <= 0.502 * step).all())
