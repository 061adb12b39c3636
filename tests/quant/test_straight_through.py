"""The hand-written gradients against autograd on the plain expression, in float64."""

import pytest
import torch

from a1q.quant.grid import lookup, nearest, round_fp16
from a1q.quant.straight_through import fold, grid_weight, scale_of


def setting(rank: int | None, tables: int = 1, entries: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank or 0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    found = {"latent": draw(6, 8), "lut": draw(tables, entries)}
    if rank:
        found |= {"a": draw(6, rank), "g": draw(rank), "b": draw(rank, 8)}
    return found


def factors(parts: dict[str, torch.Tensor]):
    return (parts["a"], parts["g"], parts["b"]) if "a" in parts else None


@pytest.mark.parametrize(("rank", "tables"), [(1, 1), (3, 1), (None, 1), (None, 3)])
@pytest.mark.parametrize("with_latent", [True, False])
def test_value_and_gradients(rank, tables, with_latent) -> None:
    parts = setting(rank, tables)
    scale = scale_of(parts["a"], parts["g"], parts["b"]) if rank else torch.ones(6, 8, dtype=torch.float64)
    indices = nearest((parts["latent"] / scale).detach(), parts["lut"].detach())
    latent = parts["latent"] if with_latent else None
    found = grid_weight(indices, latent, parts["lut"], factors(parts), False)

    offsets = torch.arange(6).div(6 // tables, rounding_mode="floor")[:, None] * parts["lut"].shape[1]
    entries = parts["lut"].reshape(-1)[indices.long() + offsets]
    expected = entries * scale
    if with_latent:
        expected = expected + parts["latent"] - parts["latent"].detach()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    upstream = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    wanted = [value for name, value in parts.items() if name != "latent" or with_latent]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
        rtol=1e-10,
        atol=1e-12,
    )


def test_gradcheck_with_indices_held() -> None:
    parts = setting(2)
    indices = nearest(torch.randn(6, 8, dtype=torch.float64), parts["lut"].detach())
    arguments = (parts["lut"], parts["a"], parts["g"], parts["b"])
    assert torch.autograd.gradcheck(lambda lut, a, g, b: grid_weight(indices, None, lut, (a, g, b), False), arguments)


def test_only_wanted_gradients_are_made() -> None:
    parts = {name: value.detach() for name, value in setting(2).items()}
    parts["g"].requires_grad_()
    indices = nearest(parts["latent"], parts["lut"])
    weight = grid_weight(indices, None, parts["lut"], factors(parts), False)
    weight.sum().backward()
    assert parts["g"].grad is not None
    assert parts["lut"].grad is None


@pytest.mark.parametrize("rank", [1, 3])
def test_fp16_rounds_the_folded_factors_and_passes_gradients(rank: int) -> None:
    parts = {name: value.detach().float() for name, value in setting(rank).items()}
    left, right = fold(parts["a"], parts["g"], parts["b"])
    torch.testing.assert_close(left @ right, (parts["a"] * parts["g"]) @ parts["b"])
    scale = scale_of(round_fp16(left), None, round_fp16(right))
    lut = round_fp16(parts["lut"])
    expected = lookup(lut, nearest(parts["latent"] / scale, lut)) * scale
    leaves = {name: value.requires_grad_() for name, value in parts.items()}
    indices = torch.zeros(6, 8, dtype=torch.uint8)
    found = grid_weight(indices, leaves["latent"], leaves["lut"], factors(leaves), True)
    assert torch.equal(found.detach(), expected)
    found.sum().backward()
    assert all(bool(value.grad.abs().sum() > 0) for value in leaves.values())


def test_no_autocast_inside() -> None:
    parts = {name: value.detach().float() for name, value in setting(3).items()}
    indices = nearest(parts["latent"], parts["lut"])
    plain = grid_weight(indices, None, parts["lut"], factors(parts), False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = grid_weight(indices, None, parts["lut"], factors(parts), False)
    assert torch.equal(plain, mixed)
