"""Balanced levels against the published expression, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from a1q.quant.build import make_scheme
from a1q.quant.grid import round_fp16
from a1q.quant.importance import Inputs
from tests.quant.properties import check_stored_form

GRANULARITIES = ("tensor", "channel")


def scheme_of(bits: int, granularity: str = "tensor", fit: str = "mse"):
    return make_scheme({"scheme": "balanced", "bits": bits, "granularity": granularity, "fit": fit})


def random_weight(seed: int = 0, rows: int = 16, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def published(weight: torch.Tensor, p: torch.Tensor, peak: torch.Tensor, bits: int) -> torch.Tensor:
    """s (clamp(round(W / s + z), 1 - 2**(n-1), 2**(n-1)) - z), z = 1/2, s = (softplus(p) + 1e-8) max|W| / 2**(n-1)."""
    high, low = 2 ** (bits - 1), 1 - 2 ** (bits - 1)
    scale = ((softplus(p) + 1e-8) * peak / high)[:, None]
    position = weight / scale + 0.5
    rounded = position + (position.round() - position).detach()
    return scale * (rounded.clamp(low, high) - 0.5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_weight_and_its_gradients_are_the_published_ones(bits: int, granularity: str) -> None:
    scheme = scheme_of(bits, granularity)
    parts = {
        name: part if name == "indices" else part.double()
        for name, part in scheme.fit(random_weight(), None, 0).items()
    }
    latent, p = random_weight(1).double().requires_grad_(), parts["p"].clone().requires_grad_()
    found = scheme.weight({**parts, "p": p}, latent, False)
    expected = published(latent, p, parts["peak"], bits)
    torch.testing.assert_close(found, expected)
    upstream = random_weight(2).double()
    gradients = torch.autograd.grad(found, (latent, p), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (latent, p), upstream))
    clamped = latent.detach().abs() > found.detach().abs().max() / (2**bits - 1) * 2**bits
    if granularity == "tensor":
        assert bool(clamped.any())
        assert torch.equal(gradients[0] == 0, clamped)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_without_a_latent_the_gradient_is_the_finite_difference(granularity: str) -> None:
    scheme = scheme_of(2, granularity)
    parts = scheme.fit(random_weight(), None, 0)
    peak, p = parts["peak"].double(), parts["p"].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: scheme.weight({**parts, "peak": peak, "p": p}, None, False), (p,), atol=1e-7
    )


def test_levels() -> None:
    for bits, levels in ((1, [-0.5, 0.5]), (2, [-1.5, -0.5, 0.5, 1.5]), (4, [step - 7.5 for step in range(16)])):
        scheme = scheme_of(bits, "channel")
        weight = torch.tensor([levels]) * 0.25
        parts = scheme.fit(weight, None, 0)
        torch.testing.assert_close(scheme.dequantize(parts), weight)
        assert parts["indices"][0].tolist() == list(range(2**bits))
        assert scheme.hardware_form(scheme.snap(parts)).lut.tolist() == [levels]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fit", ["mse", "percentile"])
@pytest.mark.parametrize("fp16", [False, True])
def test_zeros_and_constants(granularity: str, fit: str, fp16: bool) -> None:
    scheme = scheme_of(2, granularity, fit)
    zero = scheme.fit(torch.zeros(3, 8), None, 0)
    latent, p = torch.full((3, 8), 0.1, requires_grad=True), zero["p"].requires_grad_()
    weight = scheme.weight({**zero, "p": p}, latent, fp16)
    assert torch.equal(weight.detach(), torch.zeros(3, 8))
    weight.sum().backward()
    assert bool(torch.isfinite(p.grad).all()) and bool(torch.isfinite(latent.grad).all())
    same = torch.full((3, 8), -0.25)
    if fit == "mse":
        torch.testing.assert_close(scheme.dequantize(scheme.fit(same, None, 0)), same)
    dead = random_weight(0, 4, 16)
    dead[2] = 0
    found = scheme.dequantize(scheme.fit(dead, None, 0))
    assert bool(torch.isfinite(found).all())
    assert granularity == "tensor" or not bool(found[2].any())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_search_beats_the_percentile(granularity: str) -> None:
    weight = random_weight(0, 32, 256)
    statistics = torch.rand(256, generator=torch.Generator().manual_seed(4)) ** 4
    errors = {}
    for fit in ("mse", "percentile"):
        scheme = scheme_of(2, granularity, fit)
        found = scheme.dequantize(scheme.fit(weight, Inputs(statistics), 0))
        errors[fit] = float(((weight - found).square() * statistics).sum())
    assert errors["mse"] < 0.9 * errors["percentile"]
    scheme = scheme_of(2, granularity, "percentile")
    parts = scheme.fit(weight, None, 0)
    clip = (softplus(parts["p"]) * parts["peak"]).expand(32 if granularity == "channel" else 1)
    expected = weight.abs() if granularity == "channel" else weight.abs().reshape(1, -1)
    torch.testing.assert_close(clip, expected.quantile(0.995, dim=1, interpolation="nearest"), rtol=0.03, atol=0)


def test_a_scale_that_trains_finds_what_the_search_finds() -> None:
    weight = random_weight(0, 8, 256)
    scheme = scheme_of(2, "channel", "percentile")
    parts = scheme.fit(weight, None, 0)
    p = parts["p"].clone().requires_grad_()
    optimizer = torch.optim.Adam([p], lr=0.02)
    for _ in range(80):
        loss = (scheme.weight({**parts, "p": p}, weight, True) - weight).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    searched = scheme_of(2, "channel")
    best = (searched.dequantize(searched.fit(weight, None, 0)) - weight).square().sum()
    start = (scheme.dequantize(parts) - weight).square().sum()
    assert float(best) <= float(loss.detach()) <= 1.02 * float(best) < 0.8 * float(start)


def test_a_tensor_scale_is_stored_as_a_table_of_its_levels() -> None:
    scheme = scheme_of(4)
    parts = scheme.fit(random_weight(), None, 0)
    snapped = scheme.snap(parts)
    scale = (softplus(parts["p"]) + 1e-8) * parts["peak"] / 8
    assert torch.equal(snapped["lut"].float(), round_fp16((torch.arange(16) - 7.5) * scale))
    assert torch.equal(snapped["lut"], -snapped["lut"].flip(0))
    assert scheme.bits((16, 64)) == 4 * 16 * 64 + 16 * 16
    assert scheme_of(4, "channel").bits((16, 64)) == 4 * 16 * 64 + 16 * 16


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 6, 8]),
    granularity=st.sampled_from(GRANULARITIES),
    fit=st.sampled_from(["mse", "percentile"]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 33),
    size=st.floats(1e-6, 1e3),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
def test_whatever_the_weight(bits, granularity, fit, rows, columns, size, zeros, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * size
    weight[torch.rand(rows, columns, generator=generator) < zeros] = 0
    check_stored_form(scheme_of(bits, granularity, fit), weight)
