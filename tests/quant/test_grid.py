"""Nearest entries against a search over all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant.grid import lookup, nearest, round_fp16, safe_scale, snap_lut, sums_per_entry, to_fp16


def draw(seed: int, tables: int, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 35, generator=generator, dtype=torch.float64)
    return values, torch.randn(tables, entries, generator=generator, dtype=torch.float64)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 3, 6]), st.sampled_from([2, 4, 8, 16, 64, 256]), st.booleans())
def test_nearest_is_nearest(seed: int, tables: int, entries: int, ascending: bool) -> None:
    values, lut = draw(seed, tables, entries)
    lut = lut.sort(dim=1).values if ascending else lut
    indices = nearest(values, lut)
    blocks = values.reshape(tables, -1)
    best = (blocks[:, :, None] - lut[:, None, :]).abs().amin(2).reshape(values.shape)
    assert indices.dtype == torch.uint8
    assert torch.equal((values - lookup(lut, indices)).abs(), best)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([6, 16, 64, 256]),
    st.sampled_from(["even", "crowded", "equal", "one far away"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_places_in_one_table_are_those_of_a_binary_search(seed, entries, how, dtype) -> None:
    """Edges on, between and beyond cells, many in one cell, values on edges, infinite ones and none."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(entries, generator=generator, dtype=dtype).sort().values
    if how == "crowded":
        table = (table * 1e-4).index_put((torch.tensor([0, entries - 1]),), torch.tensor([-1, 1], dtype=dtype))
    elif how == "equal":
        table = table[:1].expand(entries).clone()
    elif how == "one far away":
        table[-1] = 1e30
    edges = (table[1:] + table[:-1]) / 2
    values = torch.cat(
        [torch.randn(400, generator=generator, dtype=dtype), edges, edges.new_tensor([torch.inf, -torch.inf])]
    )
    found = nearest(values[None], table[None])[0]
    assert torch.equal(found.long(), torch.searchsorted(edges, values))
    odd = nearest(torch.full((1, 4), torch.nan, dtype=dtype), table[None])
    assert int(odd.max()) < entries


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([2, 3, 4, 16]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_look_ups_in_pairs(seed, entries, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(1, entries, generator=generator).to(dtype)
    indices = torch.randint(entries, (512, 256), generator=generator).to(torch.uint8)
    for shape in ((512, 256), (256, 255), (511, 256)):
        part = indices[: shape[0], : shape[1]]
        assert torch.equal(lookup(table, part), table[0][part.long()])
    assert torch.equal(lookup(table, indices.reshape(-1)[1:-1]), table[0][indices.reshape(-1)[1:-1].long()])


def test_look_ups_keep_a_tables_gradient() -> None:
    table = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    indices = torch.zeros(128, 128, dtype=torch.uint8)
    lookup(table, indices).sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [[128.0 * 128, 0, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 6]), st.sampled_from([2, 16, 256]))
def test_sums_per_entry(seed: int, tables: int, entries: int) -> None:
    values, lut = draw(seed, tables, entries)
    indices = nearest(values, lut)
    one_hot = torch.nn.functional.one_hot(indices.reshape(tables, -1).long(), entries).double()
    expected = (one_hot * values.reshape(tables, -1, 1)).sum(1)
    torch.testing.assert_close(sums_per_entry(indices, values, lut), expected, rtol=1e-12, atol=1e-12)


def test_snapped_tables_ascend_and_mean_the_same() -> None:
    lut = torch.tensor([[0.5, -1.0, 0.25, 2.0], [1e-9, -1e-9, 3.0, -3.0]])
    indices = torch.randint(0, 4, (4, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    new, snapped = snap_lut(indices, lut)
    assert snapped.dtype == torch.float16
    assert bool((snapped[:, 1:] >= snapped[:, :-1]).all())
    assert torch.equal(lookup(snapped.float(), new), lookup(round_fp16(lut), indices))


def test_fp16_saturates_and_scale_keeps_its_sign() -> None:
    assert to_fp16(torch.tensor([1e6, -1e6, 0.1])).tolist() == [65504.0, -65504.0, pytest.approx(0.1, abs=1e-4)]
    floored = safe_scale(torch.tensor([0.0, -1e-30, -2.0]))
    assert floored[0] > 0 > floored[1]
    assert floored[2] == -2.0
