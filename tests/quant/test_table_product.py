"""Linears as vectors around one product, against the same with the weight formed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from a1q.quant.linear import QuantLinear
from a1q.quant.straight_through import assign
from a1q.quant.table_product import table_product

SPECS = [{"scheme": "lut_lowrank", "bits": 3}, {"scheme": "vector_lut", "bits": 2}]
each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["scheme"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(spec, *, state: str = "scales", bias: bool = True, fp16: bool = False) -> QuantLinear:
    torch.manual_seed(0)
    module = QuantLinear.quantize(nn.Linear(24, 16, bias=bias), spec, keep_latent="weights" in state)
    module.straight_through_fp16 = fp16
    if state == "snapped":
        module.snap()
    module.requires_grad_(False)
    for sets in ("weights", "scales", "lut"):
        for part in module.trainable(sets) if sets in state else ():
            part.requires_grad_(True)
    return module


def through_the_weight(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """What the module computes with its weight as a tensor."""
    y = x @ module.weight.to(x.dtype).T
    return y if module.bias is None else y + module.bias


@each
@pytest.mark.parametrize(
    "state", ["scales", "still", "snapped", "lut", "scales, lut", "weights", "weights, scales", "weights, scales, lut"]
)
@pytest.mark.parametrize("fp16", [False, True])
def test_values_and_gradients_are_those_of_the_weight(spec, state, fp16) -> None:
    module, upstream = made(spec, state=state, fp16=fp16), random(3, 5, 16, seed=2)
    results = []
    for forward in (module, lambda x: through_the_weight(module, x)):
        x = random(3, 5, 24, seed=1).requires_grad_()
        y = forward(x)
        trained = [part for part in module.parameters() if part.requires_grad]
        assert bool(trained) == (state not in ("still", "snapped"))
        results.append((y, torch.autograd.grad(y, [x, *trained], upstream)))
    (ours, gradients), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients, expected, strict=True):
        # the weight's own gradients are those at the factors before they are rounded
        torch.testing.assert_close(found, wanted, rtol=2e-3 if fp16 else 1e-4, atol=1e-3 if fp16 else 1e-5)


@each
def test_no_weight_is_made_where_only_scales_train(spec, monkeypatch) -> None:
    module = made(spec)
    monkeypatch.setattr(QuantLinear, "weight", property(lambda self: pytest.fail("the weight was made")))
    module(random(4, 24).requires_grad_()).sum().backward()
    assert all(part.grad is not None for part in module.trainable("scales"))


def test_gradients_in_float64() -> None:
    table, a, b = (random(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate([(1, 8), (6,), (5,)]))
    places = torch.randint(8, (6, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x = random(2, 3, 5, seed=9, dtype=torch.float64)
    for tensor in (x, table, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, table, a, b: table_product(x, table, places, a, b), (x, table, a, b))
    dense = x @ (table[0][places.long()] * a[:, None] * b).T
    torch.testing.assert_close(table_product(x, table, places, a, b), dense, rtol=1e-12, atol=1e-12)


def test_a_latent_weight_in_float64() -> None:
    """Straight through the assignment: its gradient is the weight's, and the table's that at the places it means."""
    table, a, b = (random(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate([(1, 8), (6,), (5,)]))
    latent, x = random(6, 5, seed=5, dtype=torch.float64), random(7, 5, seed=9, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, table, a, b, latent)]
    places = assign(latent.detach(), table.detach(), (a[:, None] * b).detach(), None)
    found = table_product(x, table, torch.zeros(6, 5, dtype=torch.uint8), a, b, latent, None, assign)
    grid = table[0][places.long()] * a[:, None] * b
    expected = x @ (grid + latent - latent.detach()).T
    upstream = random(7, 6, seed=3, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@each
@pytest.mark.parametrize("state", ["scales", "scales, lut", "weights, scales, lut"])
def test_autocast(spec, state) -> None:
    module, x = made(spec, state=state), random(64, 24)
    trained = [part for part in module.parameters() if part.requires_grad]
    exact = module(x)
    exact.square().sum().backward()
    wanted = [part.grad.clone() for part in trained]
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm().item() < 0.02 * exact.norm().item()
    for part, gradient in zip(trained, wanted, strict=True):
        assert part.grad.dtype == torch.float32
        assert (part.grad - gradient).norm().item() < 0.03 * gradient.norm().item()
