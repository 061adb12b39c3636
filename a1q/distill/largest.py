"""The largest values of long rows and where they stand: exact, and among equal values the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""Neighbours of which first only the largest is looked at."""
WORTH = 2
"""Blocks are worth it where there are more than so many times as many of them as values wanted."""


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last dimension and their indices (int64), descending; equal ones by index, ascending.

    Off the CPU it is `torch.topk`, which leaves the order of equal values to the device.

    Args:
        values: float32 [..., n], no NaN.
    """
    import torch

    if values.device.type != "cpu":
        top, ids = torch.topk(values, count, dim=-1)
        return top, ids
    rows = values.reshape(-1, values.shape[-1])
    places = torch.from_numpy(_largest_places(rows, count)).reshape(*values.shape[:-1], count)
    return values.gather(-1, places), places


def _largest_places(rows: Tensor, count: int) -> np.ndarray:
    """int64 [m, count], as `largest` has them, of rows [m, n].

    Of blocks of neighbours, the `count` with the largest maxima hold all that is wanted: a value outside of them is
    preceded by the maximum of each. With equal maxima the first blocks are taken, whose values have the lower indices.
    """
    length, array = rows.shape[-1], rows.numpy()
    blocks = length // BLOCK
    if blocks > WORTH * count:
        whole = rows[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK))
        chosen = _places_of_largest(whole.amax(-1).numpy(), count)
        inside = whole.numpy()[np.arange(len(rows))[:, None], chosen].reshape(len(rows), -1)
        found = _places_of_largest(np.concatenate([inside, array[:, blocks * BLOCK :]], axis=-1), count)
        # candidates are the chosen blocks in their order, then what is left of the row behind the last whole block
        block, behind = np.divmod(found, BLOCK)
        within = np.take_along_axis(chosen, np.minimum(block, count - 1), -1) * BLOCK + behind
        places = np.where(block < count, within, found + (blocks - count) * BLOCK)
    else:
        places = _places_of_largest(array, count)
    order = np.argsort(-np.take_along_axis(array, places, -1), axis=-1, kind="stable")
    return np.take_along_axis(places, order, -1)


def _places_of_largest(rows: np.ndarray, count: int) -> np.ndarray:
    """Indices [m, count], ascending, of the largest of rows [m, n]; of equal values the first."""
    length = rows.shape[-1]
    least = np.partition(rows, length - count, axis=-1)[:, length - count, None]
    kept = rows >= least
    if np.count_nonzero(kept) > len(rows) * count:
        above = rows > least
        room = count - above.sum(-1, keepdims=True)
        kept = above | ((rows == least) & ((rows == least).cumsum(-1) <= room))
    return np.nonzero(kept)[-1].reshape(len(rows), count)
