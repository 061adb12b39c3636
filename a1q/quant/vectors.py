"""Tables of vectors: one index stands for d consecutive rows of a column (vector quantization, Gersho and Gray, 1992).

A table [L, d] is also a table of L·d numbers in which index k of row i means number k d + i mod d. Spelled out like
that (`spelled`), indices work wherever those of numbers do; only what is nearest is asked of d rows together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from a1q.quant.grid import sums_per_entry

LARGEST = 256
"""Numbers in a table, at most: what one byte tells apart, and what the Neural Engine is reported to hold."""
SAMPLE, STARTS, ROUNDS = 1 << 14, 4, 40
"""k-means: vectors looked at, random starts, rounds of each."""
CHUNK = 1 << 18
"""Distances that are formed at a time; they stay in the cache."""
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def spelled(indices: Tensor, size: int) -> Tensor:
    """Places uint8 [out, in] in the table of numbers that `indices` [out / d, in] mean, d = `size`."""
    offsets = torch.arange(size, dtype=torch.uint8, device=indices.device)[:, None]
    return (indices[:, None] * size + offsets).flatten(0, 1)


def indices_of(places: Tensor, size: int) -> Tensor:
    """What `spelled` was given."""
    return places[::size] // size


def closest(use: Tensor, pull: Tensor, table: Tensor) -> Tensor:
    """Indices uint8 [k, n] of the entries c of least  Σ_j use_j c_j² - 2 pull_j c_j.

    With use = s² and pull = s v these are the nearest s ⊙ c to v; with weights and weighted values, the means' cells.

    Args:
        use: [k, d, n]
        pull: [k, d, n]
        table: [L, d]
    """
    terms = torch.cat([table.square(), -2 * table], dim=1)
    step = max(1, CHUNK // (len(table) * use.shape[2]))
    parts = zip(use.split(step), pull.split(step), strict=True)
    return torch.cat([_least(terms @ torch.cat(part, dim=1)) for part in parts])


def _least(distances: Tensor) -> Tensor:
    """Where the least of each [k, L, n] stands along its middle, uint8 [k, n]; the first of equals.

    A minimum of several numbers is an order of magnitude faster than its place. So places are written into the last
    bits of the differences to the least, of which only its own is zero; non-negative floats are ordered like integers.
    """
    above = (distances - distances.amin(1, keepdim=True)).view(INTEGERS[distances.dtype])
    places = torch.arange(distances.shape[1], dtype=above.dtype, device=above.device)[:, None]
    mask = LARGEST - 1
    return ((above & ~mask) | places).amin(1).bitwise_and_(mask).to(torch.uint8)


def nearest_vectors(weight: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Indices uint8 [out / d, in] of the vectors c of `table` [L, d] for which S ⊙ c is nearest to W [out, in]."""
    rows = (-1, table.shape[1], weight.shape[1])
    return closest(scale.square().reshape(rows), (weight * scale).reshape(rows), table)


class VectorGrid:
    """The grid of `a1q.quant.feedback` whose codes are places: vectors along rows times a scale."""

    def __init__(self, table: Tensor, scale: Tensor, rows: Tensor):
        """Take vectors [L, d], S [out, in], and how much the errors of each row count, r [out]."""
        self.size = table.shape[1]
        self.scale = scale.T.contiguous()
        self.rows = rows
        self.terms = torch.cat([table.square(), -2 * table], dim=1).T
        self.numbers = table.reshape(-1)
        self.offsets = torch.arange(self.size, device=table.device)

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Places uint8 [out] and values [out] of what column `column` can hold nearest to `values` [out]."""
        scale = self.scale[column]
        use = self.rows * scale
        terms = torch.stack([use * scale, use * values]).reshape(2, -1, self.size)
        chosen = (terms.transpose(0, 1).flatten(1) @ self.terms).argmin(1, keepdim=True)
        places = (chosen * self.size + self.offsets).reshape(-1)
        return places.to(torch.uint8), self.numbers.index_select(0, places) * scale


def kmeans(values: Tensor, use: Tensor, entries: int, size: int) -> Tensor:
    """Vectors [L, d] of least  Σ use (value - its entry)²  by Lloyd's iteration, the best of `STARTS` random starts.

    Of more than `SAMPLE` vectors, some are taken at random; always the same ones.

    Args:
        values: [out, in], every d consecutive rows of a column one vector.
        use: weights >= 0, [out, in].
        entries: L.
        size: d.
    """
    random = torch.Generator().manual_seed(0)
    count = values.numel() // size

    def vectors(matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, size, matrix.shape[1]).transpose(1, 2).reshape(count, size)

    chosen = torch.randperm(count, generator=random)[:SAMPLE].to(values.device)
    points, mass = vectors(values)[chosen], vectors(use)[chosen]
    best: tuple[float, Tensor] | None = None
    for _ in range(STARTS):
        start = torch.randint(len(points), (entries,), generator=random) if len(points) < entries else None
        if start is None:
            start = torch.randperm(len(points), generator=random)[:entries]
        found = _lloyd(points, mass, points[start.to(points.device)])
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    return best[1]


def _lloyd(points: Tensor, mass: Tensor, table: Tensor) -> tuple[float, Tensor]:
    """(weighted squared error, table [L, d]) from a start; entries that attract no weight stay where they are."""
    use, pull = mass.T[None], (mass * points).T[None]
    before = None
    for _ in range(ROUNDS):
        indices = closest(use, pull, table)
        if before is not None and torch.equal(indices, before):
            break
        before = indices
        columns = zip(mass.unbind(1), (mass * points).unbind(1), table.unbind(1), strict=True)
        table = torch.stack([_means(indices, *column) for column in columns], dim=1)
    missed = points - table[closest(use, pull, table)[0].long()]
    return float((mass * missed.square()).double().sum()), table


def _means(indices: Tensor, mass: Tensor, pull: Tensor, entries: Tensor) -> Tensor:
    """The mean of every cell in one dimension, [L]."""
    total = sums_per_entry(indices, mass, entries[None])[0]
    mean = sums_per_entry(indices, pull, entries[None])[0] / total.clamp_min(torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, mean, entries)
