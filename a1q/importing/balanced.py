"""Apple-style: evenly spaced levels without a zero, and one learned scale per weight.

    s = f max|W| / 2^(n-1),   f = softplus(p) + 1e-8,   Ŵ = s (clamp(round(W / s + 1/2), 1 - 2^(n-1), 2^(n-1)) - 1/2)

with p = `_f_param` and n = `_qat_nbits`, as the programs compute it (`QATLinear` there), in exact arithmetic: the
scheme `balanced`, whose `p` and `peak` are those of the checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from a1q.errors import MismatchError
from a1q.importing.meaning import Meaning, latent_of
from a1q.quant.build import complete

if TYPE_CHECKING:
    from a1q.importing.checkpoint import Stored

LEAST = 1e-8
"""Under f, and under max|W|."""


def read_balanced(stored: Stored) -> Meaning:
    """What an Apple-style module says.

    Raises:
        MismatchError: if it is of other than 2 or 4 bits.
    """
    import torch
    from torch.nn.functional import softplus

    weight = stored.parts["weight"].double()
    bits = int(stored.parts["_qat_nbits"].item())
    if bits not in (2, 4):
        raise MismatchError(f"{stored.name}: _qat_nbits is {bits}, expected 2 or 4")
    parameter = stored.parts["_f_param"].reshape(1)
    peak = weight.abs().max().clamp_min(LEAST).reshape(1)
    top = 2 ** (bits - 1)
    scale = (softplus(parameter.double()) + LEAST) * peak / top
    codes = (weight / scale + 0.5).round().clamp(1 - top, top)
    spec = complete({"scheme": "balanced", "bits": bits})
    parts = {"indices": (codes + (top - 1)).to(torch.uint8), "p": parameter.float(), "peak": peak.float()}
    return Meaning(spec, parts, latent_of(spec, parts, weight), carried=False)
