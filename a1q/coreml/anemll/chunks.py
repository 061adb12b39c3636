"""Divide the layers among packages. No torch, no coremltools."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

MAX_PART_BYTES = 950_000_000
"""Largest weight file of a chunk that is divided automatically: what ANEMLL found devices to load."""


def even_chunks(layers: int, chunks: int) -> list[tuple[int, int]]:
    """(first layer, one after the last) per chunk, sizes differing by at most 1."""
    borders = [layers * chunk // chunks for chunk in range(chunks + 1)]
    return list(itertools.pairwise(borders))


def fitting_chunks(layer_bytes: Sequence[int], limit: int = MAX_PART_BYTES) -> list[tuple[int, int]]:
    """The fewest even chunks of at most `limit` bytes each; one layer each if even that is too much."""
    layers = len(layer_bytes)
    for chunks in range(1, layers):
        borders = even_chunks(layers, chunks)
        if all(sum(layer_bytes[begin:end]) <= limit for begin, end in borders):
            return borders
    return even_chunks(layers, layers)
