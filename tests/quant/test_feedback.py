"""Error feedback and coordinate descent against plain float64 loops, and what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from a1q.quant import feedback
from a1q.quant.adjustable import LowRankState, TableState, Target, UniformState
from a1q.quant.feedback import TableGrid, UniformGrid, alternate, damped, descend, factor_of, quadratic_error, sweep
from a1q.quant.lowrank import als, weighted_error

LUT = torch.tensor([[-1.3, -0.4, 0.35, 1.2]], dtype=torch.float64)


def problem(seed: int, rows: int, columns: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and E[x xᵀ] of `tokens` correlated inputs of uneven size; float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens or 4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    x *= torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    return weight, x.T @ x / len(x)


def error_of(weight: Tensor, values: Tensor, h: Tensor) -> float:
    difference = weight - values
    return float(torch.einsum("ij,jk,ik->", difference, h, difference))


def reference_sweep(weight: Tensor, h: Tensor, levels: list[float]) -> Tensor:
    """One row, one column at a time: after each rounding, the columns still to come are solved for anew."""
    order = h.diagonal().argsort(descending=True, stable=True).tolist()
    result = torch.empty_like(weight)
    for i, row in enumerate(weight):
        values = row.clone()
        for step, column in enumerate(order):
            # the best the columns still to come can do, given the errors of those that are done
            done, open_ = order[:step], order[step:]
            if done:
                error = row[done] - values[done]
                values[open_] = row[open_] + torch.linalg.solve(h[open_][:, open_], h[open_][:, done] @ error)
            values[column] = min(levels, key=lambda level, aim=float(values[column]): abs(level - aim))
        result[i] = values
    return result


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 5), columns=st.integers(1, 14), block=st.sampled_from([1, 3, 64])
)
def test_a_sweep_is_optimal_feedback_whatever_the_block(seed, rows, columns, block) -> None:
    weight, gram = problem(seed, rows, columns)
    h = damped(gram, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "BLOCK", block)
        codes, values = sweep(weight, h, TableGrid(LUT, None))
    torch.testing.assert_close(values, reference_sweep(weight, h, LUT[0].tolist()), rtol=0, atol=1e-12)
    assert torch.equal(LUT[0][codes.long()], values)


def test_the_factor_is_that_of_the_inverse_in_order() -> None:
    _, gram = problem(0, 2, 20)
    h = damped(gram, 0.01)
    factor = factor_of(h)
    ordered = h[factor.order][:, factor.order]
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(ordered))
    assert torch.equal(factor.upper.triu(), factor.upper)
    assert bool((ordered.diagonal().diff() <= 0).all())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 5), columns=st.integers(1, 20), block=st.sampled_from([1, 3, 64])
)
def test_descent_never_raises_the_error_and_ends_where_no_single_code_helps(seed, rows, columns, block) -> None:
    weight, gram = problem(seed, rows, columns)
    h, grid = damped(gram, 0.01), TableGrid(LUT, None)
    codes = torch.randint(0, 4, weight.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    values = LUT[0][codes.long()]
    before = error_of(weight, values, h)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "BLOCK", block)
        for _ in range(3):
            codes, values = descend(weight, h, grid, codes, values, 1)
            after = error_of(weight, values, h)
            assert after <= before * (1 + 1e-12)
            before = after
        codes, values = descend(weight, h, grid, codes, values, 200)
    assert torch.equal(LUT[0][codes.long()], values)
    least = error_of(weight, values, h)
    for i in range(rows):
        for j in range(columns):
            for level in LUT[0]:
                other = values.clone()
                other[i, j] = level
                assert error_of(weight, other, h) >= least * (1 - 1e-9)


@pytest.mark.parametrize("tables", [1, 3])
def test_the_table_grid_finds_the_nearest_entry(tables) -> None:
    generator = torch.Generator().manual_seed(tables)
    lut = torch.randn(tables, 8, generator=generator, dtype=torch.float64).sort(1).values
    scale = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    scale[2, 3] = 0
    values = torch.randn(12, generator=generator, dtype=torch.float64)
    possible = lut.repeat_interleave(12 // tables, 0)[:, None, :] * scale[..., None]
    grid = TableGrid(lut, scale)
    for column in range(5):
        codes, found = grid.nearest(values, column)
        assert codes.dtype == torch.uint8
        torch.testing.assert_close(found, possible[torch.arange(12), column, codes.long()])
        torch.testing.assert_close(
            (found - values).abs(), (possible[:, column] - values[:, None]).abs().amin(1), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("zero", ["half", "whole"])
def test_the_uniform_grid_finds_the_nearest_level(zero) -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(6, 2, generator=generator, dtype=torch.float64)
    scale[4, 1] = 0
    points = 3.5 if zero == "half" else torch.randint(0, 8, (6, 2), generator=generator).double()
    values = 3 * torch.randn(6, generator=generator, dtype=torch.float64)
    levels = torch.arange(8, dtype=torch.float64) - (points if zero == "half" else points[..., None])
    possible = levels * scale[..., None]
    grid = UniformGrid(scale, points, 7, 10)
    for column in range(10):
        codes, found = grid.nearest(values, column)
        torch.testing.assert_close(found, possible[torch.arange(6), column // 5, codes.long()])
        nearest = (possible[:, column // 5] - values[:, None]).abs().amin(1)
        torch.testing.assert_close((found - values).abs(), nearest, rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([1, 2, 4]),
    rank=st.sampled_from([1, 3]),
    tokens=st.sampled_from([3, 200]),
    spread=st.sampled_from([0.3, 1.0, 1.25, 4.0]),
)
def test_what_is_found_is_no_worse_than_what_was_known(seed, bits, rank, tokens, spread) -> None:
    weight, gram = problem(seed, 10, 24, tokens)
    importance = gram.diagonal() / gram.diagonal().mean()
    rows = torch.rand(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    fit = als(weight, importance, bits, rank, True, 10, rows=rows)
    h = damped(gram, 0.01)
    target = Target(weight, h, rows)
    known = LowRankState(target, fit.lut, fit.a, fit.b, True)
    wide = LowRankState(target, fit.lut, spread * fit.a, fit.b, True)
    state, codes = alternate(weight, h, wide, 2, 2, rows, known=(known, fit.indices))
    found = quadratic_error(weight, state.values(codes), h, rows)
    assert found <= quadratic_error(weight, fit.weight(), h, rows) * (1 + 1e-9)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    assert bool((state.lut.diff() >= 0).all())
    if rank == 1:
        assert bool((state.a > 0).all())
        assert bool((state.b > 0).all())
    torch.testing.assert_close(known.lut, fit.lut, rtol=0, atol=0)
    torch.testing.assert_close(known.a, fit.a, rtol=0, atol=0)


def test_correlations_are_made_use_of() -> None:
    weight, gram = problem(3, 32, 48)
    importance = gram.diagonal() / gram.diagonal().mean()
    h, rows = damped(gram, 0.01), torch.ones(32, dtype=torch.float64)
    fit = als(weight, importance, 2, 1, True, 20)
    state = LowRankState(Target(weight, h, rows), fit.lut, 1.25 * fit.a, fit.b, True)
    swept = quadratic_error(weight, sweep(weight, h, state.grid())[1], h)
    state, codes = alternate(weight, h, state, 4, 3)
    found = quadratic_error(weight, state.values(codes), h)
    assert found < swept < 0.7 * quadratic_error(weight, fit.weight(), h)


def test_without_correlations_there_is_nothing_to_feed_back() -> None:
    weight, gram = problem(4, 12, 20)
    gram = gram.diagonal().diag()
    h = damped(gram, 1e-9)
    codes, values = sweep(weight, h, TableGrid(LUT, None))
    torch.testing.assert_close((values - weight).abs(), (LUT[0] - weight[..., None]).abs().amin(-1))
    again, _ = descend(weight, h, TableGrid(LUT, None), codes, values, 3)
    assert torch.equal(again, codes)
    importance = gram.diagonal() / gram.diagonal().mean()
    fit = als(weight, importance, 2, 2, True, 20)
    start = LowRankState(Target(weight, h, torch.ones_like(weight[:, 0])), fit.lut, fit.a, fit.b, True)
    state, found = alternate(weight, h, start, 3, 2, known=(start, fit.indices))
    known = weighted_error(weight, fit.weight(), importance)
    assert weighted_error(weight, state.values(found), importance) <= known * (1 + 1e-9)


@pytest.mark.parametrize("gram", ["zero", "rank 1", "silent channels"])
def test_singular_statistics_become_definite(gram) -> None:
    weight, h = problem(5, 6, 16)
    if gram == "zero":
        h = torch.zeros_like(h)
    elif gram == "rank 1":
        h = torch.ones_like(h)
    else:
        h[[2, 7]], h[:, [2, 7]] = 0, 0
    definite = damped(h, 0.01)
    assert float(torch.linalg.eigvalsh(definite)[0]) > 0
    weight[3] = 0
    state = UniformState(Target(weight, definite, torch.ones(6).double()), torch.full((6, 2), 0.5).double(), 1.5, 3)
    state, codes = alternate(weight, definite, state, 2, 2)
    assert bool(torch.isfinite(state.values(codes)).all())


def test_too_little_damping_is_told() -> None:
    with pytest.raises(ValueError, match="more `damping`"):
        factor_of(-torch.eye(3, dtype=torch.float64))


def test_rows_of_a_batch_are_fitted_as_they_are_alone() -> None:
    weight, gram = problem(6, 9, 30)
    h = damped(gram, 0.01)
    codes, values = sweep(weight, h, TableGrid(LUT, None))
    codes, _ = descend(weight, h, TableGrid(LUT, None), codes, values, 5)
    for i in range(9):
        one = weight[i : i + 1]
        found, values = sweep(one, h, TableGrid(LUT, None))
        found, _ = descend(one, h, TableGrid(LUT, None), found, values, 5)
        assert torch.equal(found[0], codes[i])


def test_the_best_round_counts() -> None:
    weight, gram = problem(7, 8, 20)
    h = damped(gram, 0.01)
    target = Target(weight, h, torch.ones(8, dtype=torch.float64))
    errors = []
    for sweeps in (1, 2, 4, 8):
        state, codes = alternate(weight, h, TableState(target, 1.4 * LUT), sweeps, 2)
        errors.append(quadratic_error(weight, state.values(codes), h))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
