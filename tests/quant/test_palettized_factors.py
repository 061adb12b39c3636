"""Factors of a low-rank scale that are palettes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant.build import complete, make_scheme
from a1q.quant.magnitudes import with_unit_directions
from a1q.quant.palettized_factors import looked_up, with_tables
from tests.quant.test_schemes import random_weight

SHAPE = (64, 96)
SPECS = [
    {"scheme": "lut_lowrank", "bits": 2, "rank": 3, "factor_bits": 4},
    {"scheme": "lut_lowrank", "bits": 4, "factor_bits": 4},
    {"scheme": "vector_lut", "bits": 2, "rank": 2, "factor_bits": 4},
]
each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))


def fitted(spec, seed: int = 0):
    scheme = make_scheme(spec)
    weight = random_weight(seed, *SHAPE)
    return scheme, weight, scheme.fit(weight, None, seed)


@each
def test_each_rank_takes_no_more_numbers_than_its_table_has(spec) -> None:
    scheme, _, parts = fitted(spec)
    snapped = scheme.snap(parts)
    for name, table, axis in (("a", "a_lut", 1), ("b", "b_lut", 0)):
        factor = looked_up(snapped)[name]
        for rank in range(spec.get("rank", 1)):
            used = factor.select(axis, rank).unique()
            assert len(used) <= 16
            assert torch.isin(used, snapped[table][rank]).all()
        assert len(parts[name].unique()) > 16 * spec.get("rank", 1)  # what it was fitted to is no palette


@each
def test_snapping_keeps_the_weight_but_for_fp16_and_can_be_repeated(spec) -> None:
    scheme, _, parts = fitted(spec)
    snapped = scheme.snap(parts)
    assert {name: tuple(part.shape) for name, part in snapped.items() if name != "indices"} == scheme.part_shapes(
        SHAPE, snapped=True
    )
    exact, stored = scheme.dequantize(parts), scheme.dequantize(snapped)
    assert float((exact - stored).abs().max()) <= 4 * 2**-11 * float(exact.abs().max()) * spec.get("rank", 1)
    assert torch.equal(scheme.dequantize(scheme.rounded(parts)), stored)  # what training with fp16 sees
    again = scheme.snap(snapped)
    assert all(torch.equal(again[name], part) for name, part in snapped.items())


@each
def test_the_error_is_near_that_of_whole_factors(spec) -> None:
    _, weight, parts = fitted(spec)
    whole = make_scheme({**spec, "factor_bits": 16})
    errors = [
        float((weight - scheme.dequantize(found)).square().sum())
        for scheme, found in ((make_scheme(spec), parts), (whole, whole.fit(weight, None, 0)))
    ]
    assert errors[0] < 1.1 * errors[1]


@each
def test_gradients_reach_factors_as_they_are_and_tables_summed_over_uses(spec) -> None:
    scheme, _, parts = fitted(spec)
    upstream = random_weight(3, *SHAPE)
    names = ("a", "b", "a_lut", "b_lut")
    seen = {name: part.clone().requires_grad_(name in names) for name, part in parts.items()}
    (scheme.weight(seen, None, False) * upstream).sum().backward()
    plain = looked_up(parts)
    plain["a"].requires_grad_(), plain["b"].requires_grad_()
    whole = make_scheme({**spec, "factor_bits": 16})
    (whole.weight(plain, None, False) * upstream).sum().backward()
    torch.testing.assert_close(seen["a"].grad, plain["a"].grad)
    torch.testing.assert_close(seen["b"].grad, plain["b"].grad)
    for rank in range(spec.get("rank", 1)):
        table, used = parts["b_lut"][rank], plain["b"].detach()[rank]
        sums = torch.stack([plain["b"].grad[rank][used == entry].sum() for entry in table])
        torch.testing.assert_close(seen["b_lut"].grad[rank], sums)
    assert {"a_lut", "b_lut"} <= set(scheme.trainable["scales"])


@each
def test_all_forms_compute_the_same(spec) -> None:
    scheme, _, parts = fitted(spec)
    x = random_weight(5, 7, SHAPE[1])
    for stored in (parts, scheme.snap(parts)):
        dense = scheme.apply(stored, x, "dense")
        for form in ("factored", "batched"):
            torch.testing.assert_close(scheme.apply(stored, x, form), dense, atol=1e-5, rtol=1e-4)


def test_bits_are_those_of_indices_and_tables() -> None:
    shape = (3072, 1024)
    scheme = make_scheme({"scheme": "lut_lowrank", "bits": 2, "rank": 32, "factor_bits": 6})
    assert scheme.bits(shape) == 2 * 3072 * 1024 + 4 * 16 + 32 * (6 * 4096 + 2 * 64 * 16)
    assert scheme.check(shape) == []
    assert scheme.width("indices") == 2
    assert scheme.width("a_indices") == 6
    assert "factors of 6 bits" in scheme.details


def test_tables_that_cost_more_than_they_save_are_refused() -> None:
    scheme = make_scheme({"scheme": "lut_lowrank", "bits": 2, "factor_bits": 8})
    (problem,) = scheme.check((256, 512))
    assert problem.startswith("tables of 256 entries for its factors take more than they save on 256x512")
    assert scheme.check((1024, 1024)) == []


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 4), bits=st.sampled_from([4, 6]))
def test_rows_are_those_of_the_whole_weight_and_moving_magnitudes_keeps_it(seed, rank, bits) -> None:
    spec = {"scheme": "lut_lowrank", "bits": 2, "rank": rank, "factor_bits": bits}
    scheme = make_scheme(spec)
    parts = scheme.fit(random_weight(seed, *SHAPE), None, seed)
    rows = torch.randint(0, SHAPE[0], (9,), generator=torch.Generator().manual_seed(seed))
    for stored in (parts, scheme.snap(parts)):
        some = scheme.dequantize(scheme.select_rows(stored, rows))
        torch.testing.assert_close(some, scheme.dequantize(stored)[rows])
    moved = with_unit_directions(parts)
    assert torch.equal(scheme.dequantize(moved), scheme.dequantize(parts))
    assert torch.equal(scheme.dequantize(scheme.snap(moved)), scheme.dequantize(scheme.snap(parts)))


def test_tables_are_those_of_least_error() -> None:
    """Against k-means by hand: every entry is the mean of the numbers that are nearest to it."""
    a, b = random_weight(1, 200, 2), random_weight(2, 2, 300)
    tables = with_tables({"a": a, "b": b}, 4)
    for factor, table in ((a.T, tables["a_lut"]), (b, tables["b_lut"])):
        for numbers, entries in zip(factor, table, strict=True):
            owner = (numbers[:, None] - entries).abs().argmin(1)
            means = torch.stack([numbers[owner == entry].mean() for entry in range(16)])
            torch.testing.assert_close(means, entries, atol=2e-3, rtol=0)


def test_complete_specs_say_it_is_off_by_default() -> None:
    assert complete({"scheme": "lut_lowrank", "bits": 2})["factor_bits"] == 16
