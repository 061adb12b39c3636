"""Affine integers against torch's own fake quantization."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant.build import make_scheme
from a1q.quant.scheme import Blockwise, Palettized
from tests.quant.properties import check_stored_form


def scheme_of(bits: int, symmetric: bool = True, group: int | None = None, fit: str = "mse"):
    place = {"granularity": "channel"} if group is None else {"granularity": "group", "group_size": group}
    return make_scheme({"scheme": "affine", "bits": bits, "symmetric": symmetric, "fit": fit, **place})


def random_weight(seed: int = 0, rows: int = 16, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_weight_and_its_gradients_are_those_of_torch(bits: int, symmetric: bool, group: int | None) -> None:
    scheme = scheme_of(bits, symmetric, group)
    parts = scheme.fit(random_weight(), None, 0)
    latent = (random_weight(1) * 1.5).requires_grad_()
    factor = parts["factor"].requires_grad_()
    found = scheme.weight({**parts, "factor": factor}, latent, False)

    size = group or 64
    scale = parts["scale"].reshape(-1).clone().requires_grad_()
    blocks = latent.detach().reshape(-1, size).requires_grad_()
    if symmetric:
        zero, low, high = torch.zeros(len(scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        zero, low, high = parts["zero"].reshape(-1).float(), 0, 2**bits - 1
    expected = torch.fake_quantize_per_channel_affine(blocks.detach(), scale.detach(), zero.int(), 0, low, high)
    torch.testing.assert_close(found.detach().reshape(-1, size), expected, rtol=1e-6, atol=1e-8)

    learnable = torch._fake_quantize_learnable_per_channel_affine(blocks, scale, zero, 0, low, high, 1.0)
    upstream = random_weight(2)
    d_latent, d_factor = torch.autograd.grad(found, (latent, factor), upstream)
    e_latent, e_scale = torch.autograd.grad(learnable, (blocks, scale), upstream.reshape(-1, size))
    assert torch.equal(d_latent.reshape(-1, size), e_latent)
    assert bool((d_latent == 0).any())
    wanted = e_scale * scale.detach()  # the factor is 1 at first
    torch.testing.assert_close(d_factor.reshape(-1), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_a_latent_the_gradient_is_the_finite_difference(symmetric: bool) -> None:
    scheme = scheme_of(4, symmetric, 16)
    parts = scheme.fit(random_weight(0, 4, 32), None, 0)
    scale, factor = parts["scale"].double(), parts["factor"].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda factor: scheme.weight({**parts, "scale": scale, "factor": factor}, None, False), (factor,)
    )


def test_minmax_clips_nothing_and_the_search_is_better() -> None:
    weight = random_weight(0, 8, 128)
    weight[:, 5] = 0.3
    for symmetric in (True, False):
        ranged = scheme_of(4, symmetric, fit="minmax")
        parts = ranged.fit(weight, None, 0)
        wrong = (ranged.dequantize(parts) - weight).abs()
        assert bool((wrong <= (1.0 if not symmetric else 0.5001) * parts["scale"]).all())
        searched = scheme_of(4, symmetric)
        better = (searched.dequantize(searched.fit(weight, None, 0)) - weight).square().sum()
        assert float(better) < 0.95 * float(wrong.square().sum())


def test_zero_points_serve_lopsided_weights_and_keep_zero_itself() -> None:
    weight = random_weight(0, 8, 128).abs()
    weight[:, ::7] = 0
    errors = {}
    for symmetric in (True, False):
        scheme = scheme_of(3, symmetric, 32)
        found = scheme.dequantize(scheme.fit(weight, None, 0))
        errors[symmetric] = float((found - weight).square().sum())
        assert not bool(found[:, ::7].any())
    assert errors[False] < 0.5 * errors[True]


def test_groups_must_divide_the_inputs() -> None:
    scheme = scheme_of(4, True, 48)
    assert scheme.check((8, 96)) == []
    assert scheme.check((8, 100)) == ["`group_size: 48` does not divide 100 inputs; near it 25 and 50 do"]
    assert scheme.check((8, 12)) == ["`group_size: 48` does not divide 12 inputs; near it 12 do"]
    assert scheme_of(4).check((8, 13)) == []


def test_what_hardware_takes() -> None:
    weight = random_weight()
    for bits in (2, 3, 4, 6, 8):
        scheme = scheme_of(bits)
        form = scheme.hardware_form(scheme.snap(scheme.fit(weight, None, 0)))
        assert isinstance(form, Palettized) and scheme.hardware == "palette"
        assert form.lut.tolist() == [list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))]
        for symmetric, group in ((False, None), (True, 16), (False, 16)):
            scheme = scheme_of(bits, symmetric, group)
            snapped = scheme.snap(scheme.fit(weight, None, 0))
            if bits in (4, 8):
                form = scheme.hardware_form(snapped)
                assert isinstance(form, Blockwise) and scheme.hardware == "blockwise"
                assert form.scale.shape == form.zero.shape == (16, 4 if group else 1)
            else:
                assert scheme.hardware == ""
                with pytest.raises(NotImplementedError):
                    scheme.hardware_form(snapped)


def test_zeros_and_constants() -> None:
    for symmetric in (True, False):
        for fp16 in (True, False):
            scheme = scheme_of(4, symmetric, 4)
            weight = torch.zeros(3, 8)
            weight[1] = 0.25
            weight[2, :4] = -0.25
            parts = scheme.fit(weight, None, 0)
            torch.testing.assert_close(scheme.dequantize(parts), weight)
            latent, factor = (weight + 0.01).requires_grad_(), parts["factor"].requires_grad_()
            scheme.weight({**parts, "factor": factor}, latent, fp16).sum().backward()
            assert bool(torch.isfinite(latent.grad).all()) and bool(torch.isfinite(factor.grad).all())


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 1, 3, 8]),
    fit=st.sampled_from(["mse", "minmax"]),
    rows=st.integers(1, 7),
    blocks=st.integers(1, 4),
    size=st.floats(1e-5, 1e3),
    shift=st.floats(-3, 3),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
def test_whatever_the_weight(bits, symmetric, group, fit, rows, blocks, size, shift, zeros, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = blocks * (group or 5)
    weight = (torch.randn(rows, columns, generator=generator) + shift) * size
    weight[torch.rand(rows, columns, generator=generator) < zeros] = 0
    scheme = scheme_of(bits, symmetric, group, fit)
    assert scheme.check((rows, columns)) == []
    check_stored_form(scheme, weight)
    each = 16 if symmetric else 16 + bits
    assert scheme.bits((rows, columns)) == bits * weight.numel() + each * rows * (columns // (group or columns))
