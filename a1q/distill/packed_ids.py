"""Token ids in few bits: the lower 16 as uint16 and those above in a bit array of their own.

The width of the upper part is 0, 1, 2, 4 or 8 bits, whatever the vocabulary needs, so that an id never crosses a byte:
an id of a vocabulary of 151,936 takes 2 bits beyond its 2 bytes. Within a byte the first id stands lowest.
"""

from __future__ import annotations

import numpy as np

WIDTHS = (0, 1, 2, 4, 8)
"""Bits of the upper part."""


def upper_bits(vocabulary: int) -> int:
    """Width of the upper part of an id below `vocabulary`.

    Raises:
        ValueError: beyond 2^24 ids.
    """
    needed = (vocabulary - 1).bit_length() - 16
    if needed > WIDTHS[-1]:
        raise ValueError(f"a vocabulary of {vocabulary} is beyond 24 bits")
    return next(width for width in WIDTHS if width >= needed)


def upper_bytes(vocabulary: int, count: int) -> int:
    """Bytes of the upper part of `count` ids that stand together."""
    return -(-count * upper_bits(vocabulary) // 8)


def pack_ids(ids: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Take ids [..., K], integers in [0, vocabulary), apart.

    Returns:
        uint16 [..., K] and uint8 [..., `upper_bytes(vocabulary, K)`].
    """
    lower, width, count = ids.astype(np.uint16), upper_bits(vocabulary), ids.shape[-1]
    if not width:
        return lower, np.zeros((*ids.shape[:-1], 0), np.uint8)
    size = upper_bytes(vocabulary, count)
    upper = np.zeros((*ids.shape[:-1], size * 8 // width), np.uint8)
    upper[..., :count] = ids >> 16
    upper = upper.reshape(*ids.shape[:-1], size, 8 // width)
    upper <<= np.arange(0, 8, width, dtype=np.uint8)
    return lower, np.bitwise_or.reduce(upper, axis=-1)


def unpack_ids(lower: np.ndarray, upper: np.ndarray, vocabulary: int) -> np.ndarray:
    """The ids, int64 [..., K], that `pack_ids` took apart."""
    ids, width = lower.astype(np.int64), upper_bits(vocabulary)
    if width:
        pieces = (upper[..., None] >> np.arange(0, 8, width, dtype=np.uint8)) & np.uint8((1 << width) - 1)
        ids |= pieces.reshape(*upper.shape[:-1], -1)[..., : lower.shape[-1]].astype(np.int64) << 16
    return ids
