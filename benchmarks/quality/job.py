"""What a method is given and what it gives back, whoever's it is."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.protocol import Tokens
from benchmarks.quality.settings import Setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Job:
    """One run of one method. It never sees the text that it is judged on."""

    teacher: Path
    """A Hugging Face folder."""
    setting: Setting
    tokens: Tokens
    seed: int
    lr: float | None
    """Of the grid; None for methods that don't train here."""
    scratch: Path
    """An empty folder of its own."""


@dataclass(frozen=True)
class Outcome:
    """Quantized weights and their price."""

    weights: Mapping[str, Tensor]
    """Parameter name -> what the stored parts dequantize to, float32."""
    bits: int
    """All that is stored for them: indices, scales, zero points, tables."""
    seconds: Mapping[str, float]
    """`fit`, and `train` where it trains; loading is left out."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Anything worth keeping: losses, versions of a peer, options as really used."""
    peak_bytes: int | None = None
    """Of the process that ran the method; None where it was this one."""


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
