"""Fits of the low-rank form: descent, exact recovery, the published start."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant import lowrank
from a1q.quant.build import make_scheme
from a1q.quant.grid import lookup
from a1q.quant.importance import Inputs


def random_weight(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with uneven rows and columns, and importances over two decades; float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight *= torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.05
    weight *= torch.rand(columns, generator=generator, dtype=torch.float64) + 0.05
    return weight, 10 ** (2 * torch.rand(columns, generator=generator, dtype=torch.float64) - 1)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([1, 2, 3, 4]),
    rank=st.integers(1, 4),
    learn_lut=st.booleans(),
    rows=st.integers(5, 40),
    columns=st.integers(5, 40),
)
def test_als_never_raises_the_weighted_error(seed, bits, rank, learn_lut, rows, columns) -> None:
    weight, importance = random_weight(seed, rows, columns)
    counted = random_weight(seed, 1, rows)[1]
    errors: list[float] = []
    fit = lowrank.als(weight, importance, bits, rank, learn_lut, 8, errors, counted)
    assert 2 <= len(errors) <= 9
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-9)
    assert errors[-1] == pytest.approx(lowrank.weighted_error(weight, fit.weight(), importance, counted))
    assert bool((fit.lut[1:] >= fit.lut[:-1]).all())
    if rank == 1:
        assert bool((fit.a > 0).all())
        assert bool((fit.b > 0).all())
    if not learn_lut:
        assert torch.equal(fit.lut, lowrank.linspace_lut(bits, weight))


def test_als_beats_the_published_start_and_more_ranks_help() -> None:
    weight, importance = random_weight(0, 96, 128)
    published = lowrank.absmax_svd(weight, 2, 1, 32)
    fits = [lowrank.als(weight, importance, 2, rank, True, 20) for rank in (1, 2, 4)]
    errors = [lowrank.weighted_error(weight, fit.weight(), importance) for fit in (published, *fits)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[3] < errors[2] < errors[1]


def test_als_finds_a_weight_of_the_form_itself() -> None:
    generator = torch.Generator().manual_seed(5)
    a = torch.rand(40, 1, generator=generator, dtype=torch.float64) + 0.5
    b = torch.rand(1, 50, generator=generator, dtype=torch.float64) + 0.5
    entries = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    weight = entries[torch.randint(0, 2, (40, 50), generator=generator)] * a * b
    fit = lowrank.als(weight, torch.ones(50, dtype=torch.float64), 1, 1, True, 30)
    torch.testing.assert_close(fit.weight(), weight, rtol=1e-4, atol=1e-5)


def test_a_step_solves_its_least_squares_problem() -> None:
    weight, importance = random_weight(2, 7, 30)
    fit = lowrank.als(weight, importance, 3, 3, True, 2)
    entries = lookup(fit.lut[None], fit.indices)
    found = lowrank.solve_left(weight, entries, importance, fit.a, fit.b)
    root = importance.sqrt()
    for row in range(7):
        design = (entries[row] * fit.b * root).T
        expected = torch.linalg.lstsq(design, weight[row] * root).solution
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("columns", "rank"), [(64, 1), (64, 3), (70, 2)])
def test_absmax_svd_is_the_svd_of_the_expanded_maxima(columns: int, rank: int) -> None:
    weight, _ = random_weight(4, 24, columns)
    expanded = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in weight.split(32, dim=1)], dim=1)
    u, s, vh = torch.linalg.svd(expanded)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    fit = lowrank.absmax_svd(weight, 2, rank, 32)
    torch.testing.assert_close(fit.scale(), expected, rtol=1e-9, atol=1e-12)
    clamped = (weight / fit.scale()).clamp(-1, 1)
    distance = (clamped[..., None] - fit.lut).abs()
    torch.testing.assert_close(
        distance.gather(2, fit.indices.long()[..., None])[..., 0], distance.amin(2), rtol=0, atol=1e-12
    )


def test_balanced_factors_say_the_same_scale() -> None:
    weight, importance = random_weight(6, 20, 30)
    fit = lowrank.als(weight, importance, 2, 3, True, 5)
    a, g, b = lowrank.balance(fit)
    torch.testing.assert_close((a * g) @ b, fit.scale())
    torch.testing.assert_close(a.square().mean(0).sqrt(), g)
    torch.testing.assert_close(b.square().mean(1).sqrt(), g)


@pytest.mark.parametrize("rank", [1, 3])
def test_zero_rows_columns_and_weights_stay_finite(rank: int) -> None:
    weight, importance = random_weight(7, 12, 16)
    weight[3], weight[:, 5] = 0, 0
    for w in (weight, torch.zeros_like(weight)):
        for fit in (lowrank.als(w, importance, 2, rank, True, 4), lowrank.absmax_svd(w, 2, rank, 8)):
            assert bool(torch.isfinite(fit.weight()).all())
            assert all(bool(torch.isfinite(part).all()) for part in lowrank.balance(fit))
    quantized = lowrank.als(weight, importance, 2, rank, True, 4).weight()
    assert float(quantized[3].abs().max()) < 0.05 * float(weight.abs().max())


def test_unit_gain_restores_the_response_of_every_row() -> None:
    weight, importance = random_weight(8, 12, 64)
    weight[4] = 0
    fit = lowrank.als(weight, importance, 2, 1, True, 20)
    gain = lowrank.unit_gain(fit, weight, importance)
    response = ((gain[:, None] * fit.weight() * weight) @ importance) / (weight.square() @ importance)
    rows = torch.arange(12) != 4
    torch.testing.assert_close(response[rows], torch.ones(11, dtype=torch.float64))
    assert bool((gain[rows] > 1).all())
    assert bool(torch.isfinite(gain).all())


def test_many_large_systems_at_once():
    """What LU of MKL with two threads gets wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        factors = torch.randn(300, 200, 260, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        matrices = factors @ factors.mT
        lower, pulls = lowrank.cholesky_factors(matrices, torch.full((300,), 1e-12, dtype=torch.float64))
    finally:
        torch.set_num_threads(threads)
    assert bool((pulls == 1e-12).all())
    torch.testing.assert_close(lower @ lower.mT, matrices, rtol=0, atol=1e-9)


def test_matrices_that_rounding_made_indefinite():
    matrices = torch.diag_embed(torch.tensor([[2.0, 1.0, 1e-9], [1.0, -3e-7, 1.0]], dtype=torch.float64))
    lower, pulls = lowrank.cholesky_factors(matrices, torch.full((2,), 1e-8, dtype=torch.float64))
    assert pulls.tolist() == pytest.approx([1e-8, 1e-6])
    one = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(lower @ lower.mT, matrices + pulls[:, None, None] * one, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (48, 200), (200, 48)], ids=str)
@pytest.mark.parametrize("odd", ["massive input", "pruned", "zero rows", "outlier columns"])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_rank_as_large_as_odd_weights(shape, odd, feedback):
    """Normal matrices are summed in float32, and their rounding may be larger than their least eigenvalues."""
    random = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(shape, generator=random)
    x = torch.randn(300, shape[1], generator=random)
    if odd == "massive input":
        x[:, 0] *= 300
    elif odd == "pruned":
        weight[torch.rand(shape, generator=random) < 0.9] = 0
    elif odd == "zero rows":
        weight[::3] = 0
    else:
        weight[:, ::17] *= 40
    gram = x.T @ x / 300
    inputs = Inputs(gram.diagonal().clone(), gram if feedback else None)
    scheme = make_scheme({"scheme": "lut_lowrank", "bits": 2, "rank": min(shape)})
    found = scheme.dequantize(scheme.fit(weight, inputs, 0))
    assert bool(torch.isfinite(found).all())
    assert float(((weight - found) ** 2 @ inputs.square).sum()) < float((weight**2 @ inputs.square).sum())
