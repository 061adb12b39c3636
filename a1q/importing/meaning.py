"""What a module of a checkpoint says in the terms of a1q: a scheme, its parts, and what was found on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.errors import MismatchError
from a1q.quant.build import complete, make_scheme

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = {2: 1, 4: 2, 8: 3, 16: 4, 64: 6, 256: 8}
"""Entries of a table -> bits of an index, as far as `lut_lowrank` has them."""
MOST_RANKS = 256
ALIEN = 0.05
"""Stored indices of which more than this share differ from what the weights say are of another checkpoint."""


@dataclass(frozen=True)
class Meaning:
    """One module, ready to be put in place."""

    spec: Mapping[str, Any]
    """The complete scheme mapping."""
    parts: Mapping[str, Tensor]
    """As `Scheme.fit` gives them: `indices` uint8, the others float32."""
    latent: Tensor | None
    """float32 [out, in], weights that mean these indices; None where the checkpoint has none left."""
    carried: bool
    """Whether the indices were stored; else they were derived from the weights, as their programs do."""
    differing: int = 0
    """Stored entries that contradict what else is stored of them; see `note`."""
    note: str = ""
    """What was done about those."""
    floored: int = 0
    """Entries whose scale V1 raises to its floor."""
    floored_error: float = 0.0
    """Largest distance there from V1's weight, in units of the weight's rms."""


def table_spec(name: str, entries: int, rank: int, group_size: int | None) -> dict[str, Any]:
    """The scheme of a table of so many entries and a scale of a rank.

    Raises:
        MismatchError: if `lut_lowrank` has no such bits or ranks.
    """
    if entries not in WIDTHS:
        raise MismatchError(f"{name}.lut has {entries} entries; a1q has tables of {', '.join(map(str, WIDTHS))}")
    if not 1 <= rank <= MOST_RANKS:
        raise MismatchError(f"{name} has a scale of rank {rank}; a1q has ranks from 1 to {MOST_RANKS}")
    group = {} if group_size is None or group_size < 1 else {"group_size": group_size}
    return complete({"scheme": "lut_lowrank", "bits": WIDTHS[entries], "rank": rank, **group})


def table_parts(indices: Tensor, lut: Tensor, a: Tensor, g: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Parts of `lut_lowrank`, magnitudes in `g` to a factor of two: a [out, r], g [r], b [r, in], any type."""
    import torch

    from a1q.quant.magnitudes import with_unit_directions

    # Factors are moved by powers of two in float64, so that what comes out is the number itself, rounded once.
    moved = with_unit_directions({"a": a.double(), "g": g.double(), "b": b.double()})
    return {
        "indices": indices.to(torch.uint8),
        "lut": lut.float(),
        **{name: part.float() for name, part in moved.items()},
        "gain": torch.ones(len(a)),
    }


def latent_of(spec: Mapping[str, Any], parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """`weight` [out, in] float32, on the grid wherever it would mean another index than `parts` have."""
    import torch

    scheme, weight = make_scheme(spec), weight.float()
    return torch.where(scheme.assign(parts, weight) == parts["indices"], weight, scheme.dequantize(parts))


def checked_indices(name: str, indices: Tensor, shape: tuple[int, ...], entries: int) -> Tensor:
    """Stored indices as int64.

    Raises:
        MismatchError: if they are of another shape, or name entries that the table lacks.
    """
    if tuple(indices.shape) != tuple(shape):
        raise MismatchError(f"{name}: its indices are {list(indices.shape)}, the module is {list(shape)}")
    indices = indices.long()
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= entries:
        raise MismatchError(f"{name}: its indices go from {low} to {high}, its table has {entries} entries")
    return indices
