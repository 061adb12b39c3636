"""V1: a table times a scale of low rank, with a floor under the scale.

    Ŵ = LUT[idx] ⊙ max(A B, 1e-8),   idx = nearest of L even levels in [-1, 1] to W / max(A B, 1e-8), clamped

as the programs compute it (`AnemllQATLinear` there), products in exact arithmetic. B may be wider than W, by zeros up
to whole groups. Indices are chosen as if the table were even, whatever it holds; the table made with a zero has half
its entries, and the zero, from 0 up to the middle, and is even on either side.

a1q's scale has no floor. Where A B is above it, the imported weight is V1's; where it is not, V1's weight is at most
1e-8 and A B may be far below zero, so that no index says it: those entries take the table's number nearest to V1's
weight, and are counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from a1q.errors import MismatchError
from a1q.importing.meaning import ALIEN, Meaning, checked_indices, latent_of, table_parts, table_spec

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.importing.checkpoint import Stored
    from a1q.importing.settings import Settings

FLOOR = 1e-8
ON_TABLE = 1e-2
"""A snapped weight is no further from an entry than this share of the least distance between two: rounding to bfloat16
moves it by less at up to 16 entries."""


def read_v1(stored: Stored, settings: Settings) -> Meaning:
    """What a V1 module says.

    Raises:
        MismatchError: if its shapes do not fit, it is not snapped as the settings say, or stored indices are another's.
    """
    import torch

    from a1q.quant.straight_through import assign

    name, parts = stored.name, stored.parts
    weight, lut = parts["weight"].double(), parts["lut"].double()
    rows, columns = weight.shape
    a, b = parts["scale_A"].double(), parts["scale_B"].double()
    rank = a.shape[1]
    if len(a) != rows or len(b) != rank or b.shape[1] < columns:
        shapes = f"scale_A {list(a.shape)} and scale_B {list(b.shape)}"
        raise MismatchError(f"{name}: {shapes} make no scale of a weight {[rows, columns]}")
    b = b[:, :columns].contiguous()
    spec = table_spec(name, len(lut), rank, settings.group_size)
    scale = a @ b
    seen = scale.clamp_min(FLOOR)
    trains = not _is_snapped(name, weight, lut, settings)
    zero = settings.include_zero if settings.include_zero is not None else bool((lut == 0).any())
    derived = v1_indices(weight, seen, len(lut), zero) if trains else nearest_entries(weight, lut)
    indices, differing, note = derived, 0, ""
    if stored.indices is not None:
        given = checked_indices(name, stored.indices, (rows, columns), len(lut))
        differing = int((given != derived).sum())
        if trains:
            if differing > ALIEN * given.numel():
                share = f"{differing / given.numel():.0%} of the stored indices differ from what its weights say"
                raise MismatchError(f"{name}: {share}; the file of indices is of another checkpoint")
            indices, note = given, "the stored index was taken, not the one that the weight says"
        else:  # snapping writes indices of entries as if these were weights still
            note = "the entry that the snapped weight holds was taken, not the stored index"
    floored = scale < FLOOR
    if bool(floored.any()):
        target = lut[indices] * seen
        indices = torch.where(floored, assign(target, lut[None], scale, None).long(), indices)
        far = float((lut[indices] * scale - target)[floored].abs().max() / target.square().mean().sqrt())
    else:
        far = 0.0
    said = table_parts(indices, lut, a, torch.ones(rank), b)
    latent = latent_of(spec, said, weight) if trains else None
    carried = stored.indices is not None or not trains
    return Meaning(spec, said, latent, carried, differing, note, int(floored.sum()), far)


def v1_indices(weight: Tensor, scale: Tensor, entries: int, include_zero: bool) -> Tensor:
    """int64 [out, in]: V1's indices for W and its floored scale."""
    import torch

    values = (weight / scale).clamp(-1, 1)
    if not include_zero or entries % 2:
        return ((values + 1) * ((entries - 1) / 2)).round().long()
    half = entries // 2
    upper = half + values * max(half - 1, 1)
    return torch.where(values < 0, (values + 1) * half, upper).round().long().clamp_(0, entries - 1)


def nearest_entries(values: Tensor, lut: Tensor) -> Tensor:
    """int64 [out, in]: where in `lut` [L] the entry nearest to each of `values` [out, in] stands."""
    from a1q.quant.grid import nearest

    return nearest(values.contiguous(), lut[None]).long()


def _is_snapped(name: str, weight: Tensor, lut: Tensor, settings: Settings) -> bool:
    """Whether `weight` holds entries of the table.

    Weights that hold entries times the scale say their indices as those that train do.

    Raises:
        MismatchError: if the settings say otherwise.
    """
    least = float(lut.sort().values.diff().abs().min())
    on_table = bool(((weight - lut[nearest_entries(weight, lut)]).abs() <= ON_TABLE * least).all())
    if settings.snapped == "lut" and not on_table:
        raise MismatchError(f"{name}: the config says that weights were snapped to their tables, and they are not")
    if settings.snapped in ("", "baked") and on_table:
        said = "multiplied by their scales" if settings.snapped else "not snapped"
        raise MismatchError(f"{name}: the config says that weights are {said}, and they are entries of the table")
    return on_table
