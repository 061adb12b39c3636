"""What a preparation is, and applying several: one decoder layer at a time, in float64, rounded once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from a1q.models.preparations.families import FAMILIES


class Decoder:
    """A dense transformers decoder of one of `FAMILIES`, by the parts that preparations change."""

    def __init__(self, model: Any):
        config = model.config
        self.model = model
        self.family = FAMILIES[config.model_type]
        self.embedding: nn.Embedding = model.model.embed_tokens
        self.layers: Sequence[Any] = model.model.layers
        self.norm: nn.Module = model.model.norm
        self.head: nn.Linear = model.lm_head
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads

    def readers(self, layer: Any) -> list[tuple[nn.Module, list[nn.Linear]]]:
        """The norms of the residual stream in this layer, each with the linears that read it."""
        attention, mlp = layer.self_attn, layer.mlp
        return [
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (getattr(layer, self.family.mlp_norm), [mlp.gate_proj, mlp.up_proj]),
        ]

    def gain(self, norm: nn.Module) -> Tensor:
        """What the norm multiplies with, [hidden] float64."""
        return norm.get_parameter("weight").double() + self.family.norm_offset

    def set_gain(self, norm: nn.Module, gain: Tensor) -> None:
        """Make `gain` [hidden] what the norm multiplies with."""
        norm.get_parameter("weight").copy_(gain - self.family.norm_offset)

    def untie(self) -> None:
        """Give the head a weight of its own, if it shares the embedding's."""
        if self.head.weight is self.embedding.weight:
            self.head.weight = nn.Parameter(self.embedding.weight.detach().clone())
            self.model.config.tie_word_embeddings = False
            self.model.all_tied_weights_keys = {}


class Preparation(ABC):
    """One technique. Its methods change weights in place, without gradients."""

    def ends(self, decoder: Decoder) -> None:  # noqa: B027  most techniques leave them alone
        """Change embedding, final norm and head; called once, before the layers."""

    @abstractmethod
    def layer(self, decoder: Decoder, index: int) -> None:
        """Change decoder layer `index`, whose parameters are float64 here; called in order."""

    def stream(self, hidden: Tensor) -> Tensor:
        """What becomes of a vector of the residual stream, `hidden` [..., hidden] float64."""
        return hidden


def prepare_model(model: Any, preparations: Sequence[Preparation], tick: Callable[[], None] = lambda: None) -> None:
    """Apply `preparations` in their order; every weight is made in float64 and rounded once to the type it had.

    Args:
        model: a dense decoder of one of `FAMILIES`; it is changed in place.
        tick: called after every layer.
    """
    decoder, dtype = Decoder(model), model.dtype
    with torch.no_grad():
        for preparation in preparations:
            preparation.ends(decoder)
        for index, layer in enumerate(decoder.layers):
            layer.to(torch.float64)
            for preparation in preparations:
                preparation.layer(decoder, index)
            layer.to(dtype)
            tick()
