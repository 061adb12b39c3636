"""The quantized embedding: rows of a quantized weight, made as they are looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from a1q.errors import StageError
from a1q.models.view import QUANTIZED, SNAPPED
from a1q.quant.importance import Inputs
from a1q.quant.module import QuantModule


class QuantEmbedding(QuantModule, nn.Embedding):  # type: ignore[override]
    """y = Ŵ[ids], times `embed_scale` where the architecture scales its embedding; Ŵ is [vocabulary, hidden].

    Only the rows that `ids` name are dequantized, forward and backward, if the scheme can say them by themselves.
    """

    kind = "embedding"
    embed_scale: Tensor | None

    def __init__(
        self,
        spec: Mapping[str, Any],
        parts: Mapping[str, Tensor],
        latent: Tensor | None = None,
        state: str = QUANTIZED,
        padding_idx: int | None = None,
        embed_scale: Tensor | None = None,
        output_dtype: torch.dtype = torch.float32,
    ):
        """As `QuantModule`; `padding_idx` is the id whose look-ups give no gradient, as in `nn.Embedding`."""
        super().__init__(spec, parts, None, latent, state)
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.register_buffer("embed_scale", embed_scale, persistent=False)
        self.output_dtype = output_dtype

    @classmethod
    def in_place_of(
        cls,
        dense: nn.Module,
        spec: Mapping[str, Any],
        parts: Mapping[str, Tensor],
        latent: Tensor | None = None,
        state: str = QUANTIZED,
    ) -> Self:
        assert isinstance(dense, nn.Embedding)
        scale = getattr(dense, "embed_scale", None)
        if scale is None and type(dense).forward is not nn.Embedding.forward:
            raise StageError(f"an embedding of type {type(dense).__name__} computes more than a look-up")
        scale = None if scale is None else torch.as_tensor(scale)
        return cls(spec, parts, latent, state, dense.padding_idx, scale, dense.weight.dtype)

    @classmethod
    def importance(cls, inputs: Inputs | None) -> Inputs | None:
        """Half what the tied head's inputs say, half evenly: rows are also looked up, and there all channels count.

        On the built-in model this is better than either alone for tables with scales of their own per row or column.
        """
        if inputs is None:
            return None
        mean = inputs.square.mean()
        gram = inputs.gram
        if gram is not None:
            gram = gram + mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return Inputs(inputs.square + mean, gram, inputs.rows)

    def set_adapter(self, lora_a: Tensor, lora_b: Tensor, alpha: float) -> None:
        """Refused.

        Raises:
            StageError: always.
        """
        raise StageError("an embedding takes no adapter: adapters are for linears")

    def forward(self, input: Tensor) -> Tensor:
        ids, places = input.unique(return_inverse=True)
        y = embedding(places, self._rows(ids), self._padding_place(ids)).to(self.output_dtype)
        return y if self.embed_scale is None else y * self.embed_scale.to(y.dtype)

    def _rows(self, ids: Tensor) -> Tensor:
        """Ŵ[ids] [n, hidden] fp32, differentiable as `weight` is."""
        size = self.scheme.vector
        if size == 1:
            return self._some(ids)
        # rows that share indices come together, and those that were not asked for go
        vectors, places = (ids // size).unique(return_inverse=True)
        rows = (vectors[:, None] * size + torch.arange(size, device=ids.device)).reshape(-1)
        return self._some(rows).index_select(0, places * size + ids % size)

    def _some(self, rows: Tensor) -> Tensor:
        """Ŵ[rows], whole vectors of them."""
        stored = self.scheme.select_rows(self._stored(), rows)
        if stored is None:
            return self.weight.index_select(0, rows)
        if self.state == SNAPPED:
            return self.scheme.dequantize(stored)
        latent = None if self.latent is None else self.latent.index_select(0, rows)
        return self.scheme.weight(stored, latent, self.straight_through_fp16)

    def _padding_place(self, ids: Tensor) -> int | None:
        """Where the padding id stands among sorted `ids`, if it does."""
        if self.padding_idx is None or not torch.is_grad_enabled():
            return None
        found = (ids == self.padding_idx).nonzero()
        return int(found[0]) if len(found) else None
