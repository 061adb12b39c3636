"""a1q's own configurations: one per method and bit width, the same in every setting and on every teacher.

`specs` says bits -> pattern of module names -> scheme without its bits; the first pattern that matches counts. `train`
says which parameter sets train and each one's learning rate as a multiple of the grid's, the first set's being 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from a1q.training.reconstruction import ReconstructConfig, ReconstructRates

VERSION = 2
"""Counted up when code behind our fits and training changes figures, so that cached cells and fits run again."""
GRADIENTS = 128
"""Sequences that gradients are measured on, as `calibrate` does by default."""

Specs = Mapping[int, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Budget:
    """How many bits linears may take together, and which each may have."""

    bpw: float
    bits: tuple[int, ...]
    sequences: int = 32
    """Of the calibration text, that the KL of every choice is measured on, fitted without E[x xᵀ]."""


@dataclass(frozen=True)
class Configuration:
    """How one of our methods fits and trains."""

    specs: Specs
    train: Mapping[str, float] = field(default_factory=dict)
    embedding: Mapping[str, Any] = field(default_factory=dict)
    """The scheme of a quantized embedding, its bits included; setting `whole` only."""
    reconstruct: ReconstructConfig | None = None
    """How every decoder layer is trained by itself after its fit."""
    budget: Mapping[int, Budget] = field(default_factory=dict)
    """By the setting's bits: other bits for single linears where that helps, as `allocate` finds them."""
    calibrate: bool = True
    """Whether E[x²] and E[x xᵀ] are measured first; a fit without them hangs on no seed."""


def _ranks(mlp: int, qo: int, kv: int, **options: Any) -> dict[str, dict[str, Any]]:
    """lut_lowrank with a rank for each kind of linear."""
    ranks = {"*.mlp.*": mlp, "*.[qo]_proj": qo, "*.[kv]_proj": kv}
    return {pattern: {"scheme": "lut_lowrank", "rank": rank, **options} for pattern, rank in ranks.items()}


RANK_1: Specs = {bits: _ranks(1, 1, 1) for bits in (2, 3, 4)}
"""2.10, 3.10 and 4.10 bits per weight on pico."""
WIDE: Specs = {bits: _ranks(3, 2, 1) for bits in (2, 3, 4)}
"""2.245, 3.245 and 4.245: what a scale and a zero point per group of 64 cost others, or less."""
PAIRS: Specs = {bits: {"*": {"scheme": "vector_lut"}} for bits in (2, 3)}
"""2.104 and 3.116: 16 or 64 pairs per weight in the place of 4 or 8 numbers."""

RECONSTRUCT = ReconstructConfig(200, ("weights", "scales", "lut"), ReconstructRates(0.02, 0.002, 0.002, 0.001))

CONFIGURATIONS: dict[str, Configuration] = {
    "a1q": Configuration(
        RANK_1,
        train={"weights": 30.0, "scales": 1.0, "lut": 1.0},
        embedding={"scheme": "lut_lowrank", "bits": 4},
        reconstruct=RECONSTRUCT,
    ),
    "a1q-wide": Configuration(WIDE, reconstruct=RECONSTRUCT),
    "a1q-budget": Configuration(
        RANK_1,
        train={"weights": 30.0, "scales": 1.0, "lut": 1.0},
        reconstruct=RECONSTRUCT,
        budget={2: Budget(2.25, (1, 2, 3, 4))},
    ),
    "a1q-pairs": Configuration(PAIRS, train={"weights": 30.0, "scales": 1.0, "lut": 1.0}, reconstruct=RECONSTRUCT),
    "a1q-scales": Configuration(RANK_1, train={"scales": 1.0, "lut": 1.0}, reconstruct=RECONSTRUCT),
    "a1q-fit": Configuration(RANK_1),
    "a1q-published": Configuration({bits: _ranks(3, 2, 1, fit="absmax_svd") for bits in (2, 3, 4)}, calibrate=False),
    "a1q-lut": Configuration({bits: {"*": {"scheme": "lut"}} for bits in (2, 3, 4)}, calibrate=False),
    "rtn": Configuration(
        {
            bits: {
                "*": {
                    "scheme": "affine",
                    "symmetric": False,
                    "granularity": "group",
                    "group_size": 64,
                    "fit": "minmax",
                }
            }
            for bits in (2, 3, 4)
        },
        calibrate=False,
    ),
}
