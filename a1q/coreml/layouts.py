"""How a decoder is divided into packages: what a layout says of its parts. Light: no coremltools, no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from a1q.coreml.architecture import Architecture

if TYPE_CHECKING:
    from a1q.coreml.weights import DecoderWeights


@dataclass(frozen=True)
class Options:
    """What every layout is told."""

    context: int
    """Positions that the cache holds."""
    prefill: int
    """Positions that `prefill` takes at once."""
    head_parts: int | None = None
    """Parts of the head; None lets the layout choose."""
    chunks: int | None = None
    """Packages over which the layers are divided; None lets the layout choose."""
    adapter_functions: bool = False
    """Whether functions without the unmerged adapters stand beside those with them."""
    residual_scale: float = 1.0
    """Factor of the residual stream."""
    name: str = "model"
    """What the model is called in file names and metadata."""


@dataclass(frozen=True)
class Part:
    """One package."""

    name: str
    """`model`, or `embeddings`, `ffn_1`, ..., `lm_head`."""
    file: str
    """File name of the package."""
    role: str
    """`model`, `embeddings`, `ffn` or `lm_head`."""
    functions: Mapping[str, int]
    """Positions per call, by function name."""
    layers: tuple[int, int]
    """First layer, and one after the last; equal where the part has none."""
    theory_bytes: int
    """Bytes of its weights by their bits."""
    build: Callable[[Callable[[], None]], Any] = field(repr=False)
    """(tick) -> MIL program; `tick` is called after every layer of a function."""

    def facts(self) -> dict[str, Any]:
        """What meta.json says of it."""
        return {
            "name": self.name,
            "file": self.file,
            "role": self.role,
            "functions": dict(self.functions),
            "layers": list(self.layers),
            "theory_bytes": self.theory_bytes,
        }


class Layout(Protocol):
    """What the module of a layout offers."""

    STATE: str
    """Name of the state that holds the cache."""

    def problems(self, config: Mapping[str, Any], options: Options, step: int) -> list[str]:
        """Why this layout can't take a model of this Hugging Face config, which `architecture.problems` accepts.

        Args:
            step: rows of the head that must stay together, because they share a table or an index.
        """

    def outputs(self, architecture: Architecture, weights: DecoderWeights, options: Options) -> list[str]:
        """Names of the logits' outputs, in the order of the vocabulary."""

    def parts(self, architecture: Architecture, weights: DecoderWeights, options: Options) -> list[Part]:
        """The packages, in the order in which they are called."""

    def companions(self, folder: Path, meta: Mapping[str, Any], options: Options) -> None:
        """Write what the apps of this layout read beside the packages into `folder`; `meta` is that of meta.json."""


BASE = "_base"
"""Ending of the functions without unmerged adapters."""
LAYOUTS = {"single": "a1q.coreml.single", "anemll": "a1q.coreml.anemll.layout"}
"""Name -> module."""


def get_layout(name: str) -> Layout:
    """The layout of that name."""
    return cast(Layout, importlib.import_module(LAYOUTS[name]))


def linear_bytes(weights: DecoderWeights, begin: int, end: int) -> int:
    """Bytes of the layers `begin` to `end` (excluded) by their bits: projections and norms."""
    prefixes = tuple(f"model.layers.{index}." for index in range(begin, end))
    if not prefixes:
        return 0
    bits = sum(linear.theory_bits for name, linear in weights.linears.items() if name.startswith(prefixes))
    return bits // 8 + 2 * sum(norm.size for name, norm in weights.norms.items() if name.startswith(prefixes))
