"""Which decoders can be prepared, and what their families differ in. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What the preparations have to know of a model type."""

    mlp_norm: str = "post_attention_layernorm"
    """The norm that the MLP reads."""
    norm_offset: float = 0.0
    """Added to the stored gains of norms."""
    post_norms: bool = False
    """Whether what attention and MLP add to the residual stream is normalised first, with gains of its own."""


FAMILIES = {
    "gemma3_text": Family("pre_feedforward_layernorm", norm_offset=1.0, post_norms=True),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}
"""Supported model types."""
