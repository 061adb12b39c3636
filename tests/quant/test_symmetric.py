"""Symmetric tables: what increments say, what training may do to them."""

import pytest
import torch

from a1q.quant.importance import Inputs
from a1q.quant.linear import QuantLinear
from a1q.quant.symmetric import entries_of, increments_of


@pytest.mark.parametrize("count", [1, 2, 8, 128])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whatever_the_increments_entries_are_symmetric_and_apart_in_fp16(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    increments = torch.randn(count) * 10.0 ** torch.randint(-6, 2, (count,))
    table = entries_of(increments)
    assert torch.equal(table, -table.flip(0))
    rounded = table.half().float()
    ulp = torch.ldexp(torch.tensor(1.0), torch.frexp(rounded[-1])[1] - 11)
    assert bool((table.diff() >= 2 * ulp * (1 - 1e-3)).all())
    assert bool((rounded.diff() > 0).all())


def test_a_symmetric_table_is_told_exactly_and_another_by_its_mean() -> None:
    table = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    assert torch.equal(entries_of(increments_of(table)), table)
    assert increments_of(torch.tensor([-3.0, -1.0, 0.0, 1.0])).tolist() == [0.5, 1.5]


def test_gradients_are_sums_over_the_entries_an_increment_moves() -> None:
    increments = torch.tensor([0.5, -1e-3, 1.0], requires_grad=True)  # the second counts as the least distance
    pull = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    (entries_of(increments) * pull).sum().backward()
    upper = pull[3:] - pull[:3].flip(0)
    assert increments.grad is not None
    assert increments.grad.tolist() == [float(upper[k:].sum()) for k in range(3)]


@pytest.mark.parametrize("known", [False, True])
def test_training_and_snapping_keep_the_symmetry(known: bool) -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(32, 24, bias=False), torch.randn(200, 32)
    inputs = Inputs(x.square().mean(0), x.T @ x / 200) if known else None
    module = QuantLinear.quantize(linear, {"scheme": "lut_lowrank", "bits": 3, "lut": "symmetric"}, inputs)
    plain = QuantLinear.quantize(linear, {"scheme": "lut_lowrank", "bits": 3}, inputs)
    wanted = linear(x).detach()

    def error(other: QuantLinear) -> float:
        return float((other(x) - wanted).detach().square().mean() / wanted.square().mean())

    assert error(module) < 1.3 * error(plain)
    module.straight_through_fp16 = True
    start = error(module)
    optimizer = torch.optim.Adam([*module.trainable("scales"), *module.trainable("lut")], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (module(x) - wanted).square().mean().backward()
        optimizer.step()
    assert error(module) < start
    trained = module.weight.detach()
    module.snap()
    assert torch.equal(module.dequantize(), trained)
    assert module.lut.shape == (8,)
    assert torch.equal(module.lut, -module.lut.flip(0))
