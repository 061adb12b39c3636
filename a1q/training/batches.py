"""Which sequences a step reads: a pure function of (seed, position), so that nothing about the order needs saving."""

from __future__ import annotations

import numpy as np


def batch_rows(seed: int, start: int, count: int, size: int) -> list[int]:
    """The rows at positions `start` ... `start + count - 1` of an endless walk over `size` sequences.

    Every pass visits each row once, in an order drawn anew from (seed, pass).
    """
    rows: list[int] = []
    while len(rows) < count:
        turn, offset = divmod(start + len(rows), size)
        order = np.random.default_rng([seed, turn]).permutation(size)
        rows += order[offset : offset + count - len(rows)].tolist()
    return rows
