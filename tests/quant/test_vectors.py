"""Tables of vectors: spelling indices out, what is nearest, k-means, and the scheme's own promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant.build import make_scheme
from a1q.quant.importance import Inputs
from a1q.quant.vectors import VectorGrid, closest, indices_of, kmeans, nearest_vectors, spelled
from tests.quant.properties import check_stored_form


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from([2, 4]), st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_spelled_out_and_back(size, vectors, columns, seed) -> None:
    entries = 256 // size
    indices = torch.randint(entries, (vectors, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    places = spelled(indices, size)
    assert places.shape == (vectors * size, columns)
    assert torch.equal(indices_of(places, size), indices)
    table = random(entries, size)
    looked_up = table[indices.long()].transpose(1, 2).reshape(places.shape)
    assert torch.equal(table.flatten()[places.long()], looked_up)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_is_that_of_all(size, dtype) -> None:
    weight, scale, table = (
        matrix.to(dtype) for matrix in (random(16, 30), random(16, 30, seed=1), random(16, size, seed=2))
    )
    every = scale.reshape(-1, 1, size, 30) * table[None, :, :, None]
    misses = (weight.reshape(-1, 1, size, 30) - every).square().sum(2)
    found = nearest_vectors(weight, table, scale)
    least = misses.gather(1, found.long()[:, None])[:, 0]
    torch.testing.assert_close(least, misses.amin(1), rtol=1e-5, atol=1e-5)


def test_of_equals_the_first_and_many_chunks_are_as_one(monkeypatch) -> None:
    use, pull = torch.ones(6, 2, 5), random(6, 2, 5)
    table = random(8, 2, seed=1).repeat(2, 1)  # every entry twice
    whole = closest(use, pull, table)
    assert int(whole.max()) < 8
    monkeypatch.setattr("a1q.quant.vectors.CHUNK", 1)
    assert torch.equal(closest(use, pull, table), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 4]), st.sampled_from([1, 3]))
def test_a_column_at_a_time_finds_what_all_at_once_do(seed, size, rank) -> None:
    scale = random(12, rank, seed=seed) @ random(rank, 7, seed=seed + 1)
    table, weight = random(16, size, seed=seed + 2), random(12, 7, seed=seed + 3)
    grid = VectorGrid(table, scale, torch.full((12,), 3.0))
    together = spelled(nearest_vectors(weight, table, scale), size)
    values = table.flatten()[together.long()] * scale
    for column in range(7):
        places, found = grid.nearest(weight[:, column], column)
        assert torch.equal(places, together[:, column])
        assert torch.equal(found, values[:, column])


def test_k_means_finds_clusters_and_weighs_them() -> None:
    centres = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, 4.0], [0.0, -4.0]])
    picked = torch.arange(4).repeat(60)
    points = centres[picked] + 0.01 * random(240, 2)
    values = points.reshape(24, 10, 2).transpose(1, 2).reshape(48, 10)  # vectors of two rows each
    found = kmeans(values, torch.ones_like(values), 4, 2)
    order = torch.cdist(centres, found).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found[order], centres, rtol=0, atol=0.02)
    # one entry for all: the weighted mean, each component by its own weights
    use = random(48, 10, seed=3).abs()
    mean = kmeans(values, use, 1, 2)[0]
    expected = np.average(values.reshape(24, 2, 10).numpy(), axis=(0, 2), weights=use.reshape(24, 2, 10).numpy())
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-4)


def test_k_means_of_fewer_vectors_than_entries() -> None:
    values = random(4, 3)
    found = kmeans(values, torch.ones_like(values), 16, 2)
    assert found.shape == (16, 2)
    assert bool(torch.isfinite(found).all())


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, 2), (1.5, 2), (2, 2), (3, 2), (1, 4), (1.5, 4)]),
    st.integers(1, 2),
    st.integers(0, 2**31),
    st.floats(1e-3, 1e2),
)
def test_stored_form(form, rank, seed, size) -> None:
    bits, vector = form
    check_stored_form(
        make_scheme({"scheme": "vector_lut", "bits": bits, "vector": vector, "rank": rank}),
        size * random(8, 12, seed=seed),
    )


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("known", ["nothing", "E[x x^T]"])
def test_pairs_lose_less_than_numbers_at_as_many_bits(bits, known) -> None:
    weight = random(96, 128)
    x = random(1000, 128, seed=1) @ random(128, 128, seed=2)
    gram = x.T @ x / 1000
    inputs = Inputs(gram.diagonal().clone(), gram) if known != "nothing" else None
    h = gram if known != "nothing" else torch.eye(128)
    errors = {}
    for name in ("lut_lowrank", "vector_lut"):
        scheme = make_scheme({"scheme": name, "bits": bits})
        missed = weight - scheme.dequantize(scheme.fit(weight, inputs, 0))
        errors[name] = float(((missed @ h) * missed).sum())
    assert errors["vector_lut"] < 0.95 * errors["lut_lowrank"]


def test_rows_that_matter_more_are_rounded_better() -> None:
    """Of a pair, the row that counts decides; without E[x x^T] rows count alike."""
    weight = random(64, 24)
    x = random(200, 24, seed=1) @ random(24, 24, seed=2)
    gram = x.T @ x / 200
    rows = torch.ones(64)
    rows[::8] = 1000
    scheme = make_scheme({"scheme": "vector_lut", "bits": 2})
    errors = []
    for given_rows in (None, rows):
        missed = weight - scheme.dequantize(scheme.fit(weight, Inputs(gram.diagonal(), gram, given_rows), 0))
        errors.append(((missed @ gram) * missed).sum(1)[::8].sum().item())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("shape", "spec", "words"),
    [
        ((13, 24), {"bits": 2}, "13 output channels are no multiple"),
        ((12, 24), {"bits": 2, "vector": 4}, "256 vectors of 4 are more than the 256 numbers"),
    ],
)
def test_a_fit_refuses_what_a_plan_would(shape, spec, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_scheme({"scheme": "vector_lut", **spec}).fit(random(*shape), None, 0)


@pytest.mark.parametrize("form", ["dense", "factored", "batched"])
def test_latents_under_autocast(form) -> None:
    from a1q.quant.linear import QuantLinear

    module = QuantLinear.quantize(torch.nn.Linear(24, 16), {"scheme": "vector_lut", "bits": 2})
    module.form = form
    x = random(5, 24)
    exact = module(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert (y.float() - exact).norm().item() < 0.03 * exact.norm().item()


def test_latents_train_through_the_choice_of_vectors() -> None:
    scheme = make_scheme({"scheme": "vector_lut", "bits": 2})
    weight = random(8, 12)
    parts = scheme.fit(weight, None, 0)
    latent = weight.clone().requires_grad_()
    for name in ("lut", "a", "b", "g"):
        parts[name].requires_grad_()
    upstream = random(8, 12, seed=5)
    found = torch.autograd.grad(scheme.weight(parts, latent, False), [latent, parts["lut"], parts["a"]], upstream)
    assert torch.equal(found[0], upstream)
    # with indices held, the weight is a plain product: autograd knows its gradient
    scale = (parts["a"] * parts["g"]) @ parts["b"]
    chosen = parts["lut"][parts["indices"].long()].transpose(1, 2).reshape(8, 12)
    expected = torch.autograd.grad(chosen * scale, [parts["lut"], parts["a"]], upstream)
    torch.testing.assert_close(found[1:], expected)
