"""The magnitudes g of S = A diag(g) B apart from their directions: moved, and rounded by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from a1q.quant.module import QuantModule

MAGNITUDES = "magnitudes"


def with_unit_directions(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts with magnitudes in `g` alone: columns of `a` and rows of `b` of norm 1, to a factor of two.

    Only powers of two move, so that no bit of S changes. Every rank moves an even number of them, so that √g moves
    one as well and the fp16 factors A√g and √gB keep their bits too.
    """
    a, g, b = parts["a"], parts["g"], parts["b"]
    left, right = _exponent(a.norm(dim=0)), _exponent(b.norm(dim=1))
    left = left + (left + right) % 2
    tables = {"a_lut": left, "b_lut": right}  # of factors that are palettes
    return {
        **parts,
        **{name: torch.ldexp(parts[name], -by[:, None]) for name, by in tables.items() if name in parts},
        "a": torch.ldexp(a, -left),
        "g": torch.ldexp(g, left + right),
        "b": torch.ldexp(b, -right[:, None]),
    }


def say_anew(module: QuantModule) -> None:
    """Move the magnitudes of a module into `g`; its weight, indices and latent stay, bit for bit."""
    module.replace_parts(with_unit_directions(module.parts()), module.latent)


def snap_magnitudes(module: QuantModule) -> float:
    """Round the magnitudes to numbers that fp16 holds, in place, and note it; returns their largest relative change.

    Indices stay as they are; those of a latent are derived anew from the grid that results.
    """
    from a1q.quant.grid import to_fp16

    worst = 0.0
    for parameter in module.trainable(MAGNITUDES):
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(to_fp16(parameter))
            change = (parameter - before).abs() / before.abs().clamp_min(torch.finfo(before.dtype).tiny)
            worst = max(worst, float(change.max()))
    module.snapped_sets = (MAGNITUDES,)
    return worst


def _exponent(norm: Tensor) -> Tensor:
    """Exponent of the power of two nearest to each norm (on a scale of logarithms); 0 for a norm of 0."""
    mantissa, exponent = torch.frexp(norm)
    return exponent - (mantissa < 0.5**0.5).int() * (norm > 0).int()
