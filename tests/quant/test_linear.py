"""The quantized linear module: states, latent, adapter, forms, PEFT."""

import pytest
import torch
from torch import nn

from a1q.errors import StageError
from a1q.quant.importance import Inputs
from a1q.quant.linear import FORMS, QuantLinear, quantized_modules, swap_module

SPECS = [
    {"scheme": "lut_lowrank", "bits": 2},
    {"scheme": "lut_lowrank", "bits": 4, "rank": 3},
    {"scheme": "lut", "bits": 3},
    {"scheme": "balanced", "bits": 2},
    {"scheme": "balanced", "bits": 4, "granularity": "channel"},
    {"scheme": "affine", "bits": 4},
    {"scheme": "affine", "bits": 8, "symmetric": False, "granularity": "group", "group_size": 8},
]
TABLES = [spec for spec in SPECS if "lut" in spec["scheme"]]


def dense(seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(24, 16, bias=bias)


def sample() -> torch.Tensor:
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("keep", [True, False])
def test_forward_is_the_dequantized_weight_in_every_form(spec, keep) -> None:
    source = dense()
    module = QuantLinear.quantize(source, spec, keep_latent=keep)
    expected = sample() @ module.dequantize().T + source.bias
    for form in FORMS:
        module.form = form
        torch.testing.assert_close(module(sample()), expected, rtol=1e-5, atol=1e-5)
    assert module.spec["scheme"] == spec["scheme"]
    assert (module.latent is not None) == keep


def test_every_set_gets_gradients_and_a_step_moves_the_output() -> None:
    module = QuantLinear.quantize(dense(), SPECS[1])
    before = module(sample())
    before.square().mean().backward()
    for name, count in (("weights", 1), ("scales", 3), ("magnitudes", 1), ("lut", 1)):
        found = module.trainable(name)
        assert len(found) == count
        assert all(bool(parameter.grad.abs().sum() > 0) for parameter in found)
    with torch.no_grad():
        module.a -= 0.05 * module.a.grad.sign()
    assert not torch.equal(module(sample()), before)


def test_latent_decides_the_indices_everywhere() -> None:
    module = QuantLinear.quantize(dense(), SPECS[0])
    with torch.no_grad():
        module.latent.neg_()
    stale = module.indices.clone()
    expected = module.weight.detach().clone()
    assert not torch.equal(module.parts()["indices"], stale)
    assert torch.equal(module.dequantize(), expected)
    module.drop_latent()
    assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("spec", TABLES)
def test_tables_that_training_disordered_mean_the_same_everywhere(spec) -> None:
    module = QuantLinear.quantize(dense(), spec)
    module.straight_through_fp16 = True
    with torch.no_grad():
        module.lut.copy_(module.lut.flip(-1) * 1.01)
    expected = module.weight.detach().clone()
    torch.testing.assert_close(module.dequantize(), expected, rtol=3e-3, atol=1e-5)
    module.snap()
    assert torch.equal(module.weight, expected)
    assert bool((module.lut.diff(dim=-1) >= 0).all())


def test_a_latent_from_the_grid_changes_nothing() -> None:
    module = QuantLinear.quantize(dense(), SPECS[1], keep_latent=False)
    before = module.dequantize()
    assert module.trainable("weights") == []
    module.start_latent()
    assert torch.equal(module.weight, before)
    assert len(module.trainable("weights")) == 1


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("fp16", [True, False])
def test_snap_keeps_the_indices_and_rounds_the_rest(spec, fp16) -> None:
    module = QuantLinear.quantize(dense(), spec)
    module.straight_through_fp16 = fp16
    before = module.weight.detach().clone()
    module.snap()
    assert module.state == "snapped"
    assert module.latent is None
    for name, parameter in module.named_parameters():
        if name != "bias":
            assert parameter.dtype == (torch.uint8 if name in module.scheme.integers else torch.float16)
    if fp16:
        assert torch.equal(module.weight, before)
    torch.testing.assert_close(module.weight, before, rtol=5e-3, atol=1e-4)
    with pytest.raises(StageError, match="does not train"):
        module.trainable("scales")


def test_adapter_is_added_and_survives_snap_in_fp16() -> None:
    module = QuantLinear.quantize(dense(), SPECS[0])
    plain = module(sample())
    a, b = torch.randn(4, 24), torch.randn(16, 4)
    module.set_adapter(a, b, alpha=2.0)
    torch.testing.assert_close(module(sample()) - plain, 0.5 * sample() @ (b @ a).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.adapter_delta(), 0.5 * b @ a)
    assert module.adapter == {"rank": 4, "alpha": 2.0}
    module.snap()
    assert module.lora_A.dtype == torch.float16
    module.drop_adapter()
    assert module.adapter is None
    with pytest.raises(ValueError, match="does not fit"):
        module.set_adapter(b, a, 1.0)


def test_refit_changes_scheme_and_latent() -> None:
    source = dense()
    module = QuantLinear.quantize(source, SPECS[1])
    target = source.weight.detach() * 2
    module.refit(SPECS[2], target)
    assert module.spec["scheme"] == "lut"
    assert torch.equal(module.latent, target)
    assert set(module.state_dict()) == {"bias", "latent", "lut", "indices"}
    fresh = QuantLinear.quantize(nn.Linear(24, 16), SPECS[2])
    fresh.refit(SPECS[2], target)
    assert torch.equal(module.dequantize(), fresh.dequantize())


def test_indices_of_error_feedback_survive_beside_a_latent() -> None:
    torch.manual_seed(3)
    x = torch.randn(200, 24) @ torch.randn(24, 24)
    inputs = Inputs(x.square().mean(0), x.T @ x / len(x))
    dense = nn.Linear(24, 16, bias=False)
    spec = {"scheme": "lut_lowrank", "bits": 2}
    without = QuantLinear.quantize(dense, spec, inputs, keep_latent=False)
    kept = QuantLinear.quantize(dense, spec, inputs, keep_latent=True)
    refitted = QuantLinear.quantize(dense, {"scheme": "lut", "bits": 3}, keep_latent=True)
    refitted.refit(spec, dense.weight, inputs)
    nearest = without.scheme.assign(without.parts(), dense.weight.detach())
    assert not torch.equal(nearest, without.indices)
    for module in (kept, refitted):
        assert torch.equal(module.dequantize(), without.dequantize())


@pytest.mark.parametrize("old", SPECS)
def test_any_scheme_follows_any_other(old) -> None:
    source = dense()
    target = source.weight.detach() * 2
    for new in SPECS:
        module = QuantLinear.quantize(source, old)
        module.refit(new, target)
        fresh = QuantLinear.quantize(source, new)
        fresh.refit(new, target)
        assert set(module.state_dict()) == set(fresh.state_dict())
        assert torch.equal(module.dequantize(), fresh.dequantize())
        assert float((module.dequantize() - target).square().sum()) < 0.5 * float(target.square().sum())


@pytest.mark.parametrize("spec", SPECS)
def test_weights_and_scales_of_any_scheme_train(spec) -> None:
    module = QuantLinear.quantize(dense(), spec)
    module.straight_through_fp16 = True
    before = module.weight.detach().clone()
    module(sample()).square().mean().backward()
    sets = [name for name in ("weights", *module.scheme.trainable) if name != "magnitudes"]
    for name in sets:
        for parameter in module.trainable(name):
            assert bool(torch.isfinite(parameter.grad).all()) and bool(parameter.grad.any())
            with torch.no_grad():
                parameter -= 0.02 * parameter.grad / parameter.grad.abs().max()
    trained = module.weight.detach().clone()
    assert not torch.equal(trained, before)
    module.snap()
    assert torch.equal(module.weight, trained)


def test_unknown_set_and_infinite_weights_are_errors() -> None:
    module = QuantLinear.quantize(dense(), SPECS[0])
    with pytest.raises(StageError, match="no trainable set 'scale'"):
        module.trainable("scale")
    source = dense()
    with torch.no_grad():
        source.weight[0, 0] = torch.inf
    with pytest.raises(StageError, match="not finite"):
        QuantLinear.quantize(source, SPECS[0])


def test_peft_accepts_it() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(nn.Linear(24, 24), dense())
    swap_module(model, "1", QuantLinear.quantize(model[1], SPECS[0]))
    assert [name for name, _ in quantized_modules(model)] == ["1"]
    expected = model(sample())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["1"], init_lora_weights=True), model)
    torch.testing.assert_close(model(sample()), expected)
    model(sample()).sum().backward()
    assert bool(model[1].lora_B["default"].weight.grad.abs().sum() > 0)


def test_autocast_keeps_the_weight_in_float32() -> None:
    module = QuantLinear.quantize(dense(), SPECS[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(sample())
        assert module.weight.dtype == torch.float32
    assert y.dtype == torch.bfloat16
