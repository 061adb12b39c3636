"""Magnitudes moved into g, and rounded by themselves."""

import pytest
import torch

from a1q.quant.linear import QuantLinear
from a1q.quant.magnitudes import say_anew, snap_magnitudes, with_unit_directions


def module(rank: int = 3, scheme: str = "lut_lowrank", keep: bool = True) -> QuantLinear:
    torch.manual_seed(5)
    made = QuantLinear.quantize(torch.nn.Linear(24, 16), {"scheme": scheme, "bits": 2, "rank": rank}, keep_latent=keep)
    with torch.no_grad():  # as training leaves them: no rank like another
        made.g.mul_(torch.tensor([37.0, 0.3, 1e-3][:rank]))
        made.a.mul_(1 + 0.1 * torch.randn(made.a.shape))
    return made


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("scheme", ["lut_lowrank", "vector_lut"])
def test_directions_have_unit_norm_and_no_bit_of_the_weight_changes(scheme: str, fp16: bool) -> None:
    made = module(scheme=scheme)
    made.straight_through_fp16 = fp16
    before, indices, latent = made.weight.detach(), made.parts()["indices"].clone(), made.latent.detach().clone()
    exact = made.dequantize()
    say_anew(made)
    assert torch.equal(made.weight, before) and torch.equal(made.dequantize(), exact)
    assert torch.equal(made.parts()["indices"], indices) and torch.equal(made.latent, latent)
    for norm in (made.a.norm(dim=0), made.b.norm(dim=1)):
        assert bool(((norm >= 0.5) & (norm <= 2)).all())
    reference = (made.a.double() * made.g.double()) @ made.b.double()
    torch.testing.assert_close(reference.float() * _entries(made), exact, rtol=1e-5, atol=1e-7)


def _entries(made: QuantLinear) -> torch.Tensor:
    places = made.scheme.places(made.indices)
    return made.scheme.table(made.lut)[0][places.long()]


def test_a_rank_that_is_not_used_stays_zero() -> None:
    parts = dict(module().parts())
    parts["a"] = parts["a"].detach() * torch.tensor([1.0, 0.0, 1.0])
    moved = with_unit_directions(parts)
    assert all(bool(torch.isfinite(part).all()) for part in moved.values() if part.is_floating_point())
    assert not moved["a"][:, 1].any()


def test_magnitudes_alone_are_rounded() -> None:
    made = module()
    before = {name: part.detach().clone() for name, part in made.parts().items()}
    worst = snap_magnitudes(made)
    assert made.snapped_sets == ("magnitudes",)
    expected = before["g"].to(torch.float16).float()
    assert torch.equal(made.g, expected) and not torch.equal(before["g"], expected)
    assert worst == pytest.approx(float(((expected - before["g"]) / before["g"]).abs().max()))
    assert 0 < worst <= 2**-11
    assert all(torch.equal(getattr(made, name), before[name]) for name in ("a", "b", "lut", "gain"))
    assert made.latent is not None
    made.replace_parts(made.parts())
    assert made.snapped_sets == ()
