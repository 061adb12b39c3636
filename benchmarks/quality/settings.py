"""The settings: bits of each linear, steps of training, and whether the embedding is quantized too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.protocol import STEPS

MIXED = {"*.mlp.*": 2, "*.self_attn.*": 4}


@dataclass(frozen=True)
class Setting:
    """What is asked of every method that takes part."""

    bits: int | Mapping[str, int]
    """Of all linears of the decoder layers, or by pattern of their names."""
    steps: int = 0
    whole: bool = False
    """The embedding and the head are quantized as well."""


SETTINGS: dict[str, Setting] = {
    "w2": Setting(2),
    "w2-200": Setting(2, STEPS),
    "w2a4": Setting(MIXED),
    "w2a4-200": Setting(MIXED, STEPS),
    "w3": Setting(3),
    "w4": Setting(4),
    "whole": Setting(2, STEPS, whole=True),
}


def bits_by_module(setting: Setting, names: list[str]) -> dict[str, int]:
    """Bits of each linear."""
    from benchmarks.quality.peers.common import layer_bits

    bits: Any = setting.bits
    return layer_bits(bits, names)
