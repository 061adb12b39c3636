"""V2: a table times directions and magnitudes.

    Ŵ = LUT[idx] ⊙ (A' diag(g) B'),   A' = A by columns and B' = B by rows, each divided by max(norm, norm_eps)

as the programs compute it (`AnemllQATLinearV2` there), products in exact arithmetic. Where their config says so, A
and B count by their magnitude or softplus, and g likewise; g = `rank_magnitude` + 1e-6 otherwise. Where the flag
`_scales_baked_flag` is set, A, g and B count as they are; files from before there was one are taken so where every g
is 1. Factors that are palettes are `A_lut[_A_idx]` and `B_lut[_B_idx]` in the place of A' and B'.

Indices are `_indices`, else where in the table `_Q` stands, else (nothing was frozen) those nearest to W / S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from a1q.errors import MismatchError
from a1q.importing.meaning import Meaning, checked_indices, latent_of, table_parts, table_spec
from a1q.importing.v1 import nearest_entries

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from a1q.importing.checkpoint import Stored
    from a1q.importing.settings import Settings

BAKED = 1e-5
"""Magnitudes that differ from 1 by no more are none, in files without a flag."""
ON_TABLE = 0.25
"""Of the least distance between two entries: so far from one a frozen number may be, which bfloat16 rounds."""
TABLE_ROUNDING = 2.0**-10
"""Of the largest entry: a table and the increments it was made of agree to the rounding of fp16."""


def read_v2(stored: Stored, settings: Settings) -> Meaning:
    """What a V2 module says.

    Raises:
        MismatchError: if its shapes do not fit, or numbers that say the same thing contradict each other.
    """
    name, parts = stored.name, stored.parts
    a, g, b = v2_factors(name, parts, settings)
    rows, rank, columns = len(a), a.shape[1], b.shape[1]
    if len(b) != rank or len(g) != rank:
        shapes = f"scale_A {list(a.shape)}, rank_magnitude {list(g.shape)} and scale_B {list(b.shape)}"
        raise MismatchError(f"{name}: {shapes} make no scale")
    weight = parts.get("weight")
    if weight is not None and tuple(weight.shape) != (rows, columns):
        raise MismatchError(f"{name}: its weight is {list(weight.shape)}, its scale {[rows, columns]}")
    lut = parts["lut"].double()
    _check_table(name, lut, parts)
    spec = table_spec(name, len(lut), rank, settings.group_size)
    indices, carried, differing = _indices(name, parts, lut, (rows, columns), a, g, b)
    said = table_parts(indices, lut, a, g, b)
    latent = None if weight is None else latent_of(spec, said, weight)
    note = "entry and index frozen beside each other disagree; the index was taken, as their `load_v2_checkpoint` does"
    return Meaning(spec, said, latent, carried, differing, note if differing else "")


def v2_factors(name: str, parts: Mapping[str, Tensor], settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(a [out, r], g [r], b [r, in]) in float64, such that the scale is a diag(g) b."""
    from torch.nn.functional import softplus

    a, b, g = (parts[key].double() for key in ("scale_A", "scale_B", "rank_magnitude"))
    flag = parts.get("_scales_baked_flag")
    if bool(flag) if flag is not None else bool(((g - 1).abs() <= BAKED).all()):
        return a, g, b
    if settings.force_positive:
        a, b = (softplus(part) if settings.positive_method == "softplus" else part.abs() for part in (a, b))
    a = a / a.norm(dim=0, keepdim=True).clamp_min(settings.norm_eps)
    b = b / b.norm(dim=1, keepdim=True).clamp_min(settings.norm_eps)
    a, b = _palette(name, parts, "A", a), _palette(name, parts, "B", b)
    by = {"identity": lambda value: value, "abs": lambda value: value.abs(), "softplus": softplus}
    return a, by[settings.magnitude_activation](g) + settings.magnitude_eps, b


def _palette(name: str, parts: Mapping[str, Tensor], letter: str, factor: Tensor) -> Tensor:
    """The factor, looked up where it is a palette.

    Raises:
        MismatchError: if there is a trained table and no indices, so that it can't be told whether it counts.
    """
    import torch

    table, indices = parts.get(f"{letter}_lut"), parts.get(f"_{letter}_idx")
    if table is None:
        return factor
    if indices is not None:
        return table.double()[checked_indices(f"{name}.{letter}_lut", indices, factor.shape, len(table))]
    if torch.allclose(table.double(), torch.linspace(-1, 1, len(table), dtype=torch.float64), atol=2**-8):
        return factor  # as it was made; k-means would have moved it
    message = f"{name}: {letter}_lut was trained, and without _{letter}_idx it can't be told whether it counts"
    raise MismatchError(message)


def _check_table(name: str, lut: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Refuse a table that is not the one its increments make: some of their files hold the table from before training.

    Raises:
        MismatchError: with the largest difference.
    """
    raw = parts.get("_lut_raw_deltas")
    if raw is None:
        return
    if 2 * len(raw) != len(lut):
        raise MismatchError(f"{name}: {len(raw)} increments make no table of {len(lut)} entries")
    made = symmetric_table(raw, float(lut.abs().max()))
    far = float((made - lut).abs().max())
    if far > TABLE_ROUNDING * float(lut.abs().max()):
        hint = "a file that their training wrote at its end has both in step (`prepare_lut_for_save`)"
        message = f"{name}: its table differs by up to {far:.3g} from the one that its trained increments make"
        raise MismatchError(f"{message}; {hint}")


def symmetric_table(raw: Tensor, largest: float) -> Tensor:
    """float64 [2 n]: ±running sums of d + (largest - n d) softmax(raw), `raw` [n], d the least distance.

    d is 2 units in the last place that fp16 has at `largest`, 1e-4 at least.
    """
    import math

    import torch

    least = max(2 * 2.0 ** (math.ceil(math.log2(max(largest, 1e-6))) - 10), 1e-4)
    steps = least + (largest - len(raw) * least) * raw.double().softmax(0)
    upper = steps.cumsum(0)
    return torch.cat([-upper.flip(0), upper])


def _indices(
    name: str,
    parts: Mapping[str, Tensor],
    lut: Tensor,
    shape: tuple[int, int],
    a: Tensor,
    g: Tensor,
    b: Tensor,
) -> tuple[Tensor, bool, int]:
    """(indices int64 [out, in], whether they were stored, how many `_Q` contradicts)."""
    frozen = parts.get("_Q")
    if frozen is not None and tuple(frozen.shape) != shape:
        raise MismatchError(f"{name}._Q is {list(frozen.shape)}, the module is {list(shape)}")
    if "_indices" in parts:
        indices = checked_indices(name, parts["_indices"], shape, len(lut))
        differing = 0 if frozen is None else int((nearest_entries(frozen.double(), lut) != indices).sum())
        return indices, True, differing
    if frozen is not None:
        indices = nearest_entries(frozen.double(), lut)
        far = float((frozen.double() - lut[indices]).abs().max())
        if far > ON_TABLE * float(lut.sort().values.diff().min()):
            raise MismatchError(f"{name}: _Q holds numbers up to {far:.3g} away from every entry of its table")
        return indices, True, 0
    from a1q.quant.grid import safe_scale

    return nearest_entries(parts["weight"].double() / safe_scale((a * g) @ b), lut), False, 0
