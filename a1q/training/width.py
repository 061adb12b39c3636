"""Whether logits are too many to be held at once."""

from __future__ import annotations

WIDE = 1 << 28
"""Bytes of a micro-batch's logits in float32 above which losses are taken tile by tile (`a1q.distill.head`)."""


def tiled(tokens: int, vocabulary: int) -> bool:
    """Whether so many positions' logits are too many."""
    return 4 * tokens * vocabulary > WIDE
