"""What every method gets and is judged by: text, splits, and the tokens of each seed.

Methods calibrate and train on the train side. Learning rates and every other choice are made on the tune side. The test
side is reported.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

TEXT = {"source": "builtin:prose", "holdout": 0.05}
LENGTH = 128
"""Tokens per sequence, everywhere."""
CALIBRATION = 1024
"""Sequences a method may look at before training."""
STEPS, BATCH = 200, 16
THREADS = 1
"""Of one cell; `--jobs` runs as many cells side by side as there are cores."""
SEEDS = (0, 1, 2)
SIDES = ("tune", "test")
PACKAGES = ("torch", "transformers", "numpy")
"""Whose versions figures may hang on."""


@dataclass(frozen=True)
class Tokens:
    """The train side as one seed gives it to a method."""

    calibration: ndarray
    """int64 [1024, 128]"""
    training: ndarray
    """int64 [3200, 128], step by step"""

    @property
    def digest(self) -> str:
        """Of both, order included."""
        return digest_of(self.calibration, self.training)


def seed_tokens(folder: Path, seed: int) -> Tokens:
    """The tokens of one seed; `folder` is a model with the tokenizer.

    Each of both draws from the whole train side without replacement.
    """
    from numpy.random import default_rng

    from a1q.data import token_sequences

    rows = token_sequences(TEXT, folder, "train", LENGTH, None, seed).astype("int64")
    random = default_rng(seed)
    return Tokens(
        rows[random.permutation(len(rows))[:CALIBRATION]], rows[random.permutation(len(rows))[: STEPS * BATCH]]
    )


def held_out(folder: Path, side: str) -> ndarray:
    """int32 [n, 128]: all there is of a side, `tune` or `test`."""
    from a1q.data import token_sequences

    if side not in SIDES:
        raise ValueError(f"nothing is measured on the {side} side")
    return token_sequences(TEXT, folder, side, LENGTH, None, 0)


def write_tokens(path: Path, tokens: Tokens) -> None:
    """The file that peers read: safetensors with int64 `calibration` and `training`."""
    from safetensors.numpy import save_file

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"calibration": tokens.calibration, "training": tokens.training}, aside)
    os.replace(aside, path)


def digest_of(*arrays: ndarray) -> str:
    """Hex sha256 of shapes, types and contents."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Of the packages, without build tags."""
    from importlib.metadata import version

    return {name: version(name).partition("+")[0] for name in PACKAGES}
