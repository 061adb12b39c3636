from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.quality.trainable import DwqLinear, SeqLinear


def dense(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(32, 8, bias=False)


@pytest.mark.parametrize("start", ["absmax", "mse"])
def test_seq_has_the_four_balanced_levels_of_its_scale(start):
    module = SeqLinear(dense(), 16, start)
    levels = module.quantized().detach().view(8, 2, 16) / module.alpha.detach()[..., None]
    allowed = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    assert (levels[..., None] - allowed).abs().amin(-1).max() < 1e-6
    assert module.bits == 2 * 256 + 16 * 16


def test_seq_takes_the_nearest_level_and_the_published_start_clips_nothing():
    module = SeqLinear(dense(), 16, "absmax")
    weight, alpha = module.latent.detach().view(8, 2, 16), module.alpha.detach()[..., None]
    levels = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    nearest = (weight / alpha)[..., None].sub(levels).abs().argmin(-1)
    assert torch.allclose(module.quantized().detach().view(8, 2, 16), levels[nearest] * alpha)
    assert float((weight.abs() / alpha).max()) == 1.0


def test_seq_gradients_are_those_of_learned_step_sizes():
    module = SeqLinear(dense(), 16, "mse")
    with torch.no_grad():
        module.alpha.mul_(0.5)  # so that some weights are clipped
    upstream = torch.randn(8, 32)
    (module.quantized() * upstream).sum().backward()
    weight, alpha = module.latent.detach().view(8, 2, 16), module.alpha.detach()[..., None]
    inside = (weight / alpha).abs() <= 1
    assert inside.any() and not inside.all()
    level = module.quantized().detach().view(8, 2, 16) / alpha
    expected = upstream.view(8, 2, 16) * (level - torch.where(inside, weight / alpha, 0.0))
    assert torch.allclose(module.latent.grad, torch.where(inside, upstream.view(8, 2, 16), 0.0).view(8, 32))
    assert torch.allclose(module.alpha.grad, expected.sum(-1), atol=1e-5)


def test_a_start_of_least_squares_is_nearer():
    layer = dense()
    nn.init.normal_(layer.weight)
    errors = [
        float((SeqLinear(layer, 16, start).quantized() - layer.weight).square().sum()) for start in ("mse", "absmax")
    ]
    assert errors[0] < 0.9 * errors[1]


def test_rounding_what_is_stored_moves_no_code():
    module = SeqLinear(dense(), 16, "mse")
    before = module.quantized().detach()
    module.round_stored()
    after = module.quantized().detach()
    assert torch.equal(before.sign(), after.sign()) and torch.allclose(before, after, rtol=1e-3)
    assert torch.equal(module.alpha, module.alpha.half().float())


def test_dwq_freezes_codes_and_trains_the_rest():
    layer = dense()
    module = DwqLinear(layer, 2, 16)
    assert module.bits == 2 * 256 + 32 * 16 and module.codes.unique().tolist() == [0, 1, 2, 3]
    error = float((module.quantized() - layer.weight).square().sum() / layer.weight.square().sum())
    assert error < 0.15
    assert {id(item) for item in module.parameters()} == {id(module.scale), id(module.shift)}
    x = torch.randn(3, 32)
    assert torch.allclose(module(x), x @ module.quantized().T)
    module.round_stored()
    assert torch.equal(module.shift, module.shift.half().float())
