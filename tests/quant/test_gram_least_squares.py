"""Least squares under E[x xᵀ] against dense float64 solutions of the vectorised problems."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from a1q.quant import gram_least_squares
from a1q.quant.adjustable import Target, UniformState
from a1q.quant.feedback import damped, quadratic_error
from a1q.quant.grid import lookup
from tests.quant.test_feedback import problem


@pytest.fixture(autouse=True)
def _to_the_end(monkeypatch):
    """As many steps as there are unknowns, so that results are exact."""
    monkeypatch.setattr(gram_least_squares, "STEPS", 400)
    monkeypatch.setattr(gram_least_squares, "ENOUGH", 1e-28)


def fitted(seed: int, rank: int = 1, rows: int = 5, columns: int = 7):
    """(weight, entries, h, a, b, r) in float64; positive factors at rank 1."""
    weight, gram = problem(seed, rows, columns)
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    entries = draw(rows, columns)
    entries = entries.abs() * weight.sign()  # as nearest entries have it, so that scales come out positive
    a, b = draw(rows, rank), draw(rank, columns)
    if rank == 1:
        a, b = a.abs() + 0.1, b.abs() + 0.1
    return weight, entries, damped(gram, 0.05), a, b, draw(rows).abs() + 0.1


def dense_solution(weight: Tensor, designs: list[Tensor], h: Tensor, rows: Tensor) -> Tensor:
    """x of least Σ r (w - Σ x_k D_k)ᵀ H (w - Σ x_k D_k), by lstsq on everything written out."""
    root = torch.linalg.cholesky(h)

    def whitened(matrix: Tensor) -> Tensor:
        return ((matrix @ root) * rows.sqrt()[:, None]).reshape(-1)

    design = torch.stack([whitened(matrix) for matrix in designs], dim=1)
    return torch.linalg.lstsq(design, whitened(weight), driver="gelsd").solution


def unit(shape: tuple[int, ...], *place: int) -> Tensor:
    matrix = torch.zeros(shape, dtype=torch.float64)
    matrix[place] = 1
    return matrix


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_row_factors(rank, seed) -> None:
    weight, entries, h, a, b, rows = fitted(seed, rank)
    found = gram_least_squares.solve_rows(weight, entries, h, a, b)
    places = [(i, k) for i in range(5) for k in range(rank)]
    expected = dense_solution(weight, [entries * (unit((5, rank), *p) @ b) for p in places], h, rows).reshape(5, rank)
    if rank == 1:
        expected = torch.where(expected > 0, expected, a)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_column_factors(rank, seed) -> None:
    weight, entries, h, a, b, rows = fitted(seed, rank, rows=9)
    found = gram_least_squares.solve_columns(weight, entries, h, a, b, rows)
    places = [(k, j) for k in range(rank) for j in range(7)]
    expected = dense_solution(weight, [entries * (a @ unit((rank, 7), *p)) for p in places], h, rows).reshape(rank, 7)
    if rank == 1:
        expected = torch.where(expected > 0, expected, b)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_tables(tables, scaled) -> None:
    weight, _, h, a, b, rows = fitted(3, 1, rows=8)
    scale = a @ b if scaled else None
    codes = torch.randint(0, 4, weight.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes[codes == 2] = 3  # an entry that nobody uses
    lut = torch.randn(tables, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = gram_least_squares.solve_tables(weight, codes, scale, h, lut, rows)
    used = [(t, level) for t in range(tables) for level in (0, 1, 3)]
    one = torch.ones_like(weight) if scale is None else scale
    designs = [lookup(unit((tables, 4), *place), codes) * one for place in used]
    expected = lut.clone()
    for place, value in zip(used, dense_solution(weight, designs, h, rows), strict=True):
        expected[place] = value
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 3])
def test_scales_of_groups(groups) -> None:
    weight, _, h, _, _, rows = fitted(4, 1, rows=4, columns=12)
    levels = weight.round() + 0.5 * weight.sign()
    start = torch.full((4, groups), 0.7, dtype=torch.float64)
    found = gram_least_squares.solve_scales(weight, levels, h, start, rows)
    places = [(i, g) for i in range(4) for g in range(groups)]
    designs = [levels * unit((4, groups), *place).repeat_interleave(12 // groups, 1) for place in places]
    expected = dense_solution(weight, designs, h, rows).reshape(4, groups)
    assert bool((expected > 0).all())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_one_scale_for_all() -> None:
    weight, _, h, _, _, rows = fitted(5, 1, rows=6, columns=10)
    levels = weight.round() + 0.5 * weight.sign()
    found = gram_least_squares.solve_scales(weight, levels, h, torch.ones(1, 1, dtype=torch.float64), rows)
    torch.testing.assert_close(found[0], dense_solution(weight, [levels], h, rows), rtol=1e-9, atol=0)


def test_scales_stay_positive_and_those_of_zero_stay() -> None:
    weight, _, h, _, _, rows = fitted(6, 1, rows=4, columns=12)
    levels = weight.round() + 0.5 * weight.sign()
    levels[1, 4:8] *= -1
    start = torch.full((4, 3), 0.7, dtype=torch.float64)
    start[2, 0] = 0
    found = gram_least_squares.solve_scales(weight, levels, h, start, rows)
    assert torch.equal(found[1], start[1])
    assert float(found[2, 0]) == 0
    assert bool((found[[0, 3]] > 0).all())
    target = Target(weight, h, rows)
    codes = levels.sub(levels.min()).to(torch.uint8)
    before, after = (UniformState(target, scale, float(-levels.min()), 9).values(codes) for scale in (start, found))
    assert quadratic_error(weight, after, h, rows) < quadratic_error(weight, before, h, rows)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(2, 4), steps=st.integers(1, 6))
def test_few_steps_lower_the_error_and_do_almost_all(seed, rank, steps) -> None:
    weight, entries, h, a, b, rows = fitted(seed, rank, rows=12, columns=16)

    def error(left: Tensor, right: Tensor) -> float:
        return quadratic_error(weight, entries * (left @ right), h, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_least_squares, "STEPS", steps)
        fewer = gram_least_squares.solve_rows(weight, entries, h, a, b)
        assert error(fewer, b) <= error(a, b) * (1 + 1e-9)
        narrower = gram_least_squares.solve_columns(weight, entries, h, a, b, rows)
        assert error(a, narrower) <= error(a, b) * (1 + 1e-9)
        if steps >= rank:
            torch.testing.assert_close(
                error(fewer, b),
                error(gram_least_squares.solve_rows(weight, entries, h, fewer, b), b),
                rtol=1e-6,
                atol=0,
            )


@pytest.mark.parametrize("separate", [False, True])
def test_conjugate_gradients_solve_what_they_are_given(separate) -> None:
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64)
    matrices = roots @ roots.transpose(1, 2) + torch.eye(6, dtype=torch.float64)
    right, start = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    right[2] = start[2] = 0  # a problem that is solved already

    def operator(x: Tensor) -> Tensor:
        return (matrices @ x[..., None])[..., 0]

    diagonal = matrices.diagonal(dim1=1, dim2=2)
    found = gram_least_squares.conjugate_gradients(
        operator, right - operator(start), start, lambda x: x / diagonal, separate=separate
    )
    torch.testing.assert_close(found, torch.linalg.solve(matrices, right))


def test_silent_codes_leave_everything_where_it_stood() -> None:
    weight, _, h, a, b, rows = fitted(8, 2)
    nothing = torch.zeros_like(weight)
    assert torch.equal(gram_least_squares.solve_rows(weight, nothing, h, a, b), a)
    assert torch.equal(gram_least_squares.solve_columns(weight, nothing, h, a, b, rows), b)
