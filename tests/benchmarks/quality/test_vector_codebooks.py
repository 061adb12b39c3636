from __future__ import annotations

import pytest
import torch

from a1q.quant.feedback import TableGrid, descend, quadratic_error, sweep
from benchmarks.quality.vector_codebooks import (
    WAYS,
    InputVectors,
    OutputVectors,
    State,
    Way,
    bits_per_weight,
    descend_vectors,
    fit,
    kmeans,
    sweep_vectors,
    vectors_of,
)


def problem(rows=16, columns=12, seed=0):
    """W, a definite H whose inputs go together, a, b."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    mixed = torch.randn(200, columns, generator=random) @ torch.randn(columns, columns, generator=random)
    a, b = (0.5 + torch.rand(count, generator=random) for count in (rows, columns))
    return weight, (mixed.T @ mixed / 200).double(), a, b


def table(entries, size, seed=1):
    return torch.randn(1, entries, size, generator=torch.Generator().manual_seed(seed))


def nearest_of_all(targets, candidates, metric):
    """Index of the least (t - c) M (t - c)ᵀ for each t [n, d], in float64; candidates [n, L, d]."""
    difference = (targets[:, None] - candidates).double()
    return ((difference @ metric) * difference).sum(-1).argmin(1)


def test_vectors_of_one_number_are_the_scalar_grid():
    weight, _, a, b = problem()
    lut = table(4, 1).sort(dim=1).values
    scalar = TableGrid(lut[..., 0], a[:, None] * b)
    for column in range(weight.shape[1]):
        wanted, found = (grid.nearest(weight[:, column], column) for grid in (scalar, OutputVectors(lut, a, b)))
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])


def test_output_vectors_are_the_nearest():
    weight, _, a, b = problem()
    entries = table(16, 2)
    codes, values = OutputVectors(entries, a, b).nearest(weight[:, 3], 3)
    candidates = entries * a.reshape(-1, 1, 2) * b[3]
    best = nearest_of_all(weight[:, 3].reshape(-1, 2), candidates, torch.eye(2, dtype=torch.float64))
    assert torch.equal(codes.reshape(-1, 2).long(), best[:, None].expand(-1, 2))
    torch.testing.assert_close(values.reshape(-1, 2), candidates[torch.arange(8), best])


def test_input_vectors_are_the_nearest_under_their_metric():
    weight, h, a, b = problem()
    entries, factor = table(16, 2), torch.linalg.cholesky(h[4:6, 4:6]).float()
    codes, values = InputVectors(entries, a, b).nearest(weight[:, 4:6], 4, factor)
    candidates = entries * b[4:6] * a.reshape(-1, 1, 1)
    best = nearest_of_all(weight[:, 4:6], candidates, h[4:6, 4:6])
    assert torch.equal(codes.long(), best)
    torch.testing.assert_close(values, candidates[torch.arange(16), best])


def test_sweep_and_descent_of_single_columns_are_those_of_the_library():
    weight, h, a, b = problem()
    lut = table(4, 1).sort(dim=1).values
    vectors, scalar = InputVectors(lut, a, b), TableGrid(lut[..., 0], a[:, None] * b)
    swept, wanted = sweep_vectors(weight, h, vectors), sweep(weight, h, scalar)
    assert torch.equal(swept[0], wanted[0])
    descended = descend_vectors(weight, h, vectors, *swept, 3)
    assert torch.equal(descended[0], descend(weight, h, scalar, *wanted, 3)[0])


@pytest.mark.parametrize("seed", range(5))
def test_neither_descent_nor_least_squares_of_pairs_raises_the_error(seed):
    weight, h, a, b = problem(seed=seed)
    for way in (WAYS["outputs"], WAYS["inputs"], Way(tables=8)):
        start = table(way.entries, way.size, seed).repeat(way.tables, 1, 1)
        state = State(weight, h, way, start, a, b)
        codes = state.improved()
        before = quadratic_error(weight, state.values(codes), h)
        state.solve(codes)
        solved = quadratic_error(weight, state.values(codes), h)
        assert solved < before
        assert quadratic_error(weight, state.values(state.improved(codes)), h) <= solved * (1 + 1e-5)


def test_error_feedback_of_pairs_beats_rounding_them():
    weight, h, a, b = problem(rows=64)
    grid = InputVectors(table(16, 2), a.repeat(4)[:64], b)
    single = torch.cat([grid.nearest(weight[:, j : j + 2], j, torch.eye(2))[1] for j in range(0, 12, 2)], dim=1)
    assert quadratic_error(weight, sweep_vectors(weight, h, grid)[1], h) < quadratic_error(weight, single, h)


def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    noise = 0.1 * torch.randn(200, 4, 2, generator=torch.Generator().manual_seed(0))
    vectors = (centres + noise).reshape(-1, 2)
    found = kmeans(vectors, torch.ones_like(vectors), 4)
    assert float(torch.cdist(centres, found).min(1).values.max()) < 0.1


def test_vectors_lie_as_the_values_of_a_state_do():
    weight, h, a, b = problem()
    for way in (WAYS["outputs"], WAYS["inputs"]):
        entries = table(16, 2)
        along = 0 if way.along == "outputs" else 1
        codes = torch.arange(16 * 12 // 2).reshape([8, 12] if along == 0 else [16, 6]).remainder(16).to(torch.uint8)
        state = State(weight, h, way, entries, torch.ones_like(a), torch.ones_like(b))
        values = state.values(codes.repeat_interleave(2, dim=along))
        wanted = entries[0][codes.reshape(-1).long()]
        assert torch.equal(vectors_of(values, way), wanted)


def test_every_number_is_counted():
    assert WAYS["scalar"].bits(256, 128) == 2 * 256 * 128 + 16 * (4 + 256 + 128)
    assert WAYS["outputs"].bits(256, 128) == WAYS["tables"].bits(256, 128) == 2 * 256 * 128 + 16 * (32 + 256 + 128)
    assert WAYS["fours"].bits(256, 128) == 2 * 256 * 128 + 16 * (1024 + 256 + 128)
    assert bits_per_weight(WAYS["scalar"], [(256, 128)] * 3) == WAYS["scalar"].bits(256, 128) / (256 * 128)


@pytest.mark.parametrize("name", ["outputs", "inputs", "tables"])
def test_a_fit_is_in_fp16_and_has_few_vectors(name):
    weight, h, _, _ = problem(rows=64, columns=16)
    found = fit(weight, h.float(), WAYS[name])
    assert quadratic_error(weight, found, h) < 0.3 * quadratic_error(weight, torch.zeros_like(weight), h)
    assert torch.equal(found, fit(weight, h.float(), WAYS[name]))
