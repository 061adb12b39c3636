"""Evenly spaced grids against brute force, and hand-written gradients against autograd, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant.uniform import (
    level_values,
    range_scale,
    round_through,
    round_to_codes,
    search_scale,
    search_scale_and_zero,
    uniform_weight,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), halves=st.integers(0, 510), groups=st.sampled_from([1, 2, 5]), seed=st.integers(0, 999))
def test_codes_are_those_of_the_nearest_levels(bits, halves, groups, seed) -> None:
    top = 2**bits - 1
    zero = min(halves, 2 * top) / 2
    scale = draw(4, groups, seed=seed).abs() + 0.01
    weight = draw(4, 10, seed=seed + 1) * (top + 1)
    codes = round_to_codes(weight, scale, zero, top)
    every = torch.stack([level_values(torch.full_like(codes, code), scale, zero) for code in range(top + 1)])
    found = (level_values(codes, scale, zero) - weight).abs()
    torch.testing.assert_close(found, (every - weight).abs().amin(0), rtol=1e-12, atol=1e-12)


def test_a_value_midway_takes_the_smaller_code_and_a_scale_of_zero_is_harmless() -> None:
    scale = torch.tensor([[2.0], [0.0]])
    codes = round_to_codes(torch.tensor([[-1.0, 1.0, 3.0], [0.0, 5.0, -5.0]]), scale, 2.0, 3)
    assert codes[0].tolist() == [1, 2, 3]
    assert level_values(codes, scale, 2.0)[1].tolist() == [0, 0, 0]


def plain(latent: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, top: int) -> torch.Tensor:
    """s (clamp(round(V / s + z), 0, top) - z), the rounding straight-through."""
    blocks = latent.reshape(*scale.shape, -1)
    zero = zero[..., None] if isinstance(zero, torch.Tensor) else zero
    position = blocks / scale[..., None] + zero
    rounded = position + (position.round() - position).detach()
    return (scale[..., None] * (rounded.clamp(0, top) - zero)).reshape(latent.shape)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("zero", [1.5, 2.0, "per block"])
def test_value_and_gradients_with_a_latent(groups: int, zero: float | str) -> None:
    top = 3
    latent, scale = draw(5, 12).requires_grad_(), (draw(5, groups, seed=1).abs() / 2 + 0.3).requires_grad_()
    place = draw(5, groups, seed=2).abs().round().clamp(0, top) if isinstance(zero, str) else zero
    codes = round_to_codes(latent.detach(), scale.detach(), place, top)
    value = level_values(codes, scale.detach(), place)
    found, expected = uniform_weight(value, codes, latent, scale, place, top), plain(latent, scale, place, top)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = draw(5, 12, seed=3)
    torch.testing.assert_close(
        torch.autograd.grad(found, (latent, scale), upstream), torch.autograd.grad(expected, (latent, scale), upstream)
    )
    clamped = torch.autograd.grad(uniform_weight(value, codes, latent, scale, place, top).sum(), latent)[0] == 0
    assert 0 < int(clamped.sum()) < clamped.numel()


@pytest.mark.parametrize("groups", [1, 4])
def test_without_a_latent_the_gradient_is_the_finite_difference(groups: int) -> None:
    codes = torch.randint(0, 16, (3, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def weight(scale: torch.Tensor) -> torch.Tensor:
        return uniform_weight(level_values(codes, scale.detach(), 7.5), codes, None, scale, 7.5, 15)

    assert torch.autograd.gradcheck(weight, (draw(3, groups).abs().requires_grad_(),))


def test_rounding_goes_through() -> None:
    values = torch.tensor([0.1, 1e6, -3.3], requires_grad=True)
    rounded = round_through(values)
    assert rounded.tolist() == [float(torch.tensor(0.1).half()), 65504.0, float(torch.tensor(-3.3).half())]
    rounded.sum().backward()
    assert values.grad.tolist() == [1, 1, 1]


def error(weight: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, top: int):
    codes = round_to_codes(weight, scale, zero, top)
    return ((level_values(codes, scale, zero) - weight).square() * h).sum(1)


def rows(kind: str) -> torch.Tensor:
    weight = draw(6, 256)
    if kind == "outlier":
        weight[:, 3] = 40
    return weight.abs() if kind == "lopsided" else weight


@pytest.mark.parametrize("kind", ["normal", "outlier", "lopsided"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_search_finds_the_best_scale_of_a_fine_sweep(bits: int, kind: str) -> None:
    weight, h, top = rows(kind), draw(256, seed=5).abs() + 0.01, 2**bits - 1
    start = weight.abs().amax(1, keepdim=True) / (top / 2)
    found = error(weight, h, search_scale(weight, h, start, top / 2, top), top / 2, top)
    sweep = torch.stack([error(weight, h, start * ratio, top / 2, top) for ratio in torch.linspace(0.005, 1.1, 2000)])
    assert bool((found <= 1.03 * sweep.amin(0)).all())
    assert float(found.sum()) <= 1.005 * float(sweep.amin(0).sum())


@pytest.mark.parametrize("kind", ["normal", "outlier", "lopsided"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_finds_the_best_scale_and_zero_of_a_fine_sweep(bits: int, kind: str) -> None:
    weight, h, top = rows(kind), draw(256, seed=5).abs() + 0.01, 2**bits - 1
    low, high = weight.amin(1, keepdim=True).clamp_max(0), weight.amax(1, keepdim=True).clamp_min(0)
    scale, zero = search_scale_and_zero(weight, h, low, high, top)
    assert torch.equal(zero, zero.round().clamp(0, top))
    found = error(weight, h, scale, zero, top)
    widest = torch.maximum(-low, high) / top * 2
    best = torch.stack(
        [
            error(weight, h, widest * ratio, float(place), top)
            for place in range(top + 1)
            for ratio in torch.linspace(0.01, 1.1, 400)
        ]
    ).amin(0)
    assert bool((found <= 1.05 * best).all())
    ranged = error(weight, h, *range_scale(low, high, top), top)
    assert bool((found < ranged).all())


def test_blocks_of_zeros_and_of_one_value() -> None:
    weight = torch.tensor([[0.0] * 8, [0.25] * 8, [-0.25] * 8])
    low, high = weight.amin(1, keepdim=True).clamp_max(0), weight.amax(1, keepdim=True).clamp_min(0)
    scale, zero = search_scale_and_zero(weight, torch.ones(8), low, high, 3)
    assert torch.equal(level_values(round_to_codes(weight, scale, zero, 3), scale, zero), weight)
    even = search_scale(weight, torch.ones(8), weight.abs().amax(1, keepdim=True) / 1.5, 1.5, 3)
    torch.testing.assert_close(level_values(round_to_codes(weight, even, 1.5, 3), even, 1.5), weight)
