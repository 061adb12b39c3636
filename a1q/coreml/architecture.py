"""What kind of decoder a Hugging Face config describes, in the terms the graph needs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STATE = "kv_cache"
"""Name of the package's state."""
MAX_DIMENSION = 16384
"""Largest dimension of a tensor on the Neural Engine."""
MAX_PARTS = 64
"""Most outputs over which the vocabulary is divided."""


@dataclass(frozen=True)
class Family:
    """What the config of a model type leaves unsaid."""

    qk_norm: bool
    """RMSNorm over every head of queries and keys, before the rotation."""
    default_head_dim: int | None = None
    """None: hidden size over heads."""


FAMILIES = {"qwen3": Family(qk_norm=True, default_head_dim=128)}
"""Supported model types."""


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with grouped-query attention, rotary positions and a gated SiLU MLP."""

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    rope_theta: float
    rms_eps: float
    tied: bool

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a config that `problems` found nothing wrong with."""
    family = FAMILIES[config["model_type"]]
    heads = int(config["num_attention_heads"])
    head_dim = config.get("head_dim") or family.default_head_dim or int(config["hidden_size"]) // heads
    return Architecture(
        model_type=config["model_type"],
        vocabulary=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        qk_norm=family.qk_norm,
        rope_theta=float(_rope(config).get("rope_theta", config.get("rope_theta", 10000.0))),
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def problems(config: Mapping[str, Any]) -> list[str]:
    """Say what of this config the decoder graph can't express; empty when it can all of it."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        return [f"the coreml exporter knows no model type {model_type!r}; it supports: {known}"]
    architecture = read_architecture(config)
    found = []
    rope_type = _rope(config).get("rope_type") or _rope(config).get("type") or "default"
    if rope_type != "default":
        found.append(f"rotary scaling {rope_type!r} is not supported; only plain rotary positions are")
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"activation {config['hidden_act']!r} is not supported; only silu is")
    if config.get("use_sliding_window"):
        found.append("sliding-window attention is not supported: the cache holds the whole context")
    if architecture.heads % architecture.kv_heads:
        found.append(f"{architecture.heads} heads can't share {architecture.kv_heads} key/value heads evenly")
    if architecture.head_dim % 32:
        found.append(
            f"head_dim {architecture.head_dim} is not a multiple of 32, which the Neural Engine asks of a state's "
            "last axis"
        )
    sizes = {
        "hidden_size": architecture.hidden,
        "intermediate_size": architecture.intermediate,
        "num_attention_heads x head_dim": architecture.heads * architecture.head_dim,
    }
    found += [
        f"{name} is {size}; the Neural Engine takes dimensions up to {MAX_DIMENSION}"
        for name, size in sizes.items()
        if size > MAX_DIMENSION
    ]
    return found


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def head_parts(vocabulary: int, step: int = 1) -> int:
    """The fewest equal parts of the head that each have at most 16384 rows, a multiple of `step`; 0 if there are none.

    Args:
        step: rows that must stay together, because they share a table.
    """
    for parts in range(-(-vocabulary // MAX_DIMENSION), MAX_PARTS + 1):
        if vocabulary % (parts * step) == 0:
            return parts
    return 0
