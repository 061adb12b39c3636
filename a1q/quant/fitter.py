"""Put quantized modules in the place of dense ones, one name at a time, whoever says in which order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from a1q.quant.embedding import QuantEmbedding
from a1q.quant.linear import QuantLinear
from a1q.quant.measure import relative_error
from a1q.quant.module import QuantModule, naming
from a1q.quant.tied import swap_module

if TYPE_CHECKING:
    from a1q.quant.importance import Inputs


class Fitter(Protocol):
    """What a stage does with one module."""

    def fit(self, name: str, inputs: Inputs | None) -> None:
        """Put the fitted module `name` in its place in the model."""

    def restore(self, name: str, parts: Mapping[str, Tensor], latent: Tensor | None) -> None:
        """Put module `name` in its place with parts that were fitted before."""


class DenseFitter:
    """Fits schemes to dense modules.

    Attributes:
        errors: name -> `relative_error` of every module fitted here.
    """

    def __init__(self, model: nn.Module, specs: Mapping[str, Mapping[str, Any]], keep_latent: set[str], seed: int):
        """Take the scheme mapping of every module that will be fitted, and the names of those that keep a latent."""
        self.model, self.specs, self.keep_latent, self.seed = model, specs, keep_latent, seed
        self.errors: dict[str, tuple[float, float]] = {}

    def fit(self, name: str, inputs: Inputs | None) -> None:
        dense = self.model.get_submodule(name)
        assert isinstance(dense.weight, Tensor)
        with naming(name):
            module = class_for(dense).quantize(dense, self.specs[name], inputs, self.seed, name in self.keep_latent)
        self.errors[name] = relative_error(dense.weight.detach(), module.dequantize(), inputs)
        swap_module(self.model, name, module)

    def restore(self, name: str, parts: Mapping[str, Tensor], latent: Tensor | None) -> None:
        dense = self.model.get_submodule(name)
        swap_module(self.model, name, class_for(dense).in_place_of(dense, self.specs[name], parts, latent))


def class_for(dense: nn.Module) -> type[QuantModule]:
    """The quantized class that takes the place of a dense module."""
    return QuantEmbedding if isinstance(dense, nn.Embedding) else QuantLinear
