"""Which side of the split a document is on: a salted hash gives it a place in [0, 1), and thresholds do the rest.

The thresholds nest: with a smaller `holdout`, test is a part of the larger one's test, and train only grows.
"""

from __future__ import annotations

import hashlib

SPLITS = ("train", "tune", "test")
SALT = "a1q text 409"
"""Of a few hundred salts tried, one that gives a small holdout of the standard library many modules, none dominant."""


def place_of(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: the same on every machine and Python version."""
    digest = hashlib.sha256(f"{SALT}/{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def side_of(place: float, holdout: float) -> str:
    """`test` below half the holdout, `tune` below the whole of it, else `train`."""
    if place < holdout / 2:
        return "test"
    return "tune" if place < holdout else "train"
