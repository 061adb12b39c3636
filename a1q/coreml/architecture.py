"""What kind of decoder a Hugging Face config describes, in the terms the graph needs. No torch.

Families differ in a few facts only (`Family`); everything else is read from the config. A raw config.json and one
that transformers has completed are both understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_DIMENSION = 16384
"""Largest dimension of a tensor on the Neural Engine."""
MAX_PARTS = 64
"""Most outputs over which the vocabulary is divided."""
FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activation of the MLP's gate: Hugging Face name -> the graph's."""
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary types whose frequencies do not depend on the length of the text."""


@dataclass(frozen=True)
class Family:
    """What the config of a model type leaves unsaid."""

    title: str
    qk_norm: bool = False
    """RMSNorm over every head of queries and keys, before the rotation."""
    default_head_dim: int | None = None
    """None: hidden size over heads."""
    default_window: int | None = None
    """Sliding window of a config that does not mention one."""
    window_switch: bool = False
    """Whether windows need `use_sliding_window: true`."""
    sliding_every: int | None = None
    """Where layer types are not listed: every layer but each n-th is sliding; None: all or none."""
    gemma: bool = False
    """Norm gains are 1 + w, what attention and MLP add is normalised too, embeddings are scaled by √hidden,
    scores by `query_pre_attn_scalar`^-½."""


FAMILIES = {
    "gemma3_text": Family(
        "Gemma 3 (text)", qk_norm=True, default_head_dim=256, default_window=4096, sliding_every=6, gemma=True
    ),
    "llama": Family("Llama 3"),
    "mistral": Family("Mistral", default_window=4096),
    "qwen2": Family("Qwen 2.5", window_switch=True),
    "qwen3": Family("Qwen 3", qk_norm=True, default_head_dim=128, window_switch=True),
}
"""Supported model types."""


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with grouped-query attention, rotary positions and a gated MLP."""

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    rms_eps: float
    tied: bool
    activation: str
    """`silu` or `gelu_tanh`."""
    query_scale: float
    """Factor of the scores q k."""
    embedding_scale: float
    """Factor of the embedding's rows."""
    post_norms: bool
    """Whether what attention and MLP add to the residual stream is normalised first."""
    norm_offset: float
    """Added to the stored gains of norms."""
    layer_kinds: tuple[str, ...]
    """`full_attention` or `sliding_attention`, per layer."""
    window: int
    """Positions that a sliding layer sees, the present one included; 0 without sliding layers."""

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers that there are."""
        return tuple(sorted(set(self.layer_kinds)))


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a config that `problems` found nothing wrong with."""
    family = FAMILIES[config["model_type"]]
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or family.default_head_dim or hidden // heads)
    kinds, window = _layer_kinds(config, family)
    scalar = float(config.get("query_pre_attn_scalar") or 256) if family.gemma else head_dim
    return Architecture(
        model_type=config["model_type"],
        vocabulary=int(config["vocab_size"]),
        hidden=hidden,
        intermediate=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        qk_norm=family.qk_norm,
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", family.gemma)),
        activation=ACTIVATIONS[_activation(config, family)],
        query_scale=scalar**-0.5,
        embedding_scale=hidden**0.5 if family.gemma else 1.0,
        post_norms=family.gemma,
        norm_offset=1.0 if family.gemma else 0.0,
        layer_kinds=kinds,
        window=window,
    )


def problems(config: Mapping[str, Any]) -> list[str]:
    """Say what of this config the decoder graph can't express; empty when it can all of it."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(f"{name} ({family.title})" for name, family in sorted(FAMILIES.items()))
        return [f"the coreml exporter knows no model type {model_type!r}; it supports: {known}"]
    try:
        return _problems(config, FAMILIES[model_type])
    except (AttributeError, TypeError, ValueError) as error:  # an entry of a type that no such model has
        return [f"config.json is not that of a {model_type} model: {error}"]


def _problems(config: Mapping[str, Any], family: Family) -> list[str]:
    """The same, of a family that is known."""
    found = []
    for rope_type in sorted({_rope_type(rope) for rope in _ropes(config)} - set(ROTATIONS)):
        found.append(f"rotary scaling {rope_type!r} is not supported; supported: {', '.join(ROTATIONS)}")
    if any(float(rope.get("partial_rotary_factor") or 1) != 1 for rope in (config, *_ropes(config))):
        found.append("partial rotary positions are not supported: every channel of a head must rotate")
    activation = _activation(config, family)
    if activation not in ACTIVATIONS:
        found.append(f"activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            found.append(f"{name} is not supported")
    if config.get("use_bidirectional_attention"):
        found.append("use_bidirectional_attention is not supported: a decoder looks back only")
    kinds, window = _layer_kinds(config, family)
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        found.append(f"layers of type {', '.join(unknown)} are not supported; supported: {FULL}, {SLIDING}")
    if SLIDING in kinds and window < 1:
        found.append(f"sliding_window is {window}, but there are sliding layers")
    if found:
        return found
    architecture = read_architecture(config)
    if len(kinds) != architecture.layers:
        found.append(f"layer_types lists {len(kinds)} layers, num_hidden_layers says {architecture.layers}")
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


def head_parts(vocabulary: int, step: int = 1) -> int:
    """The fewest equal parts of the head that each have at most 16384 rows, a multiple of `step`; 0 if there are none.

    Args:
        step: rows that must stay together, because they share a table or an index.
    """
    for parts in range(-(-vocabulary // MAX_DIMENSION), MAX_PARTS + 1):
        if vocabulary % (parts * step) == 0:
            return parts
    return 0


def _activation(config: Mapping[str, Any], family: Family) -> str:
    if family.gemma:
        return str(config.get("hidden_activation") or "gelu_pytorch_tanh")
    return str(config.get("hidden_act", "silu"))


def _layer_kinds(config: Mapping[str, Any], family: Family) -> tuple[tuple[str, ...], int]:
    """The kind of every layer, and the window of sliding ones."""
    layers = int(config["num_hidden_layers"])
    window = config.get("sliding_window", family.default_window)
    listed = config.get("layer_types")
    if listed and (not family.window_switch or config.get("use_sliding_window")):
        kinds = tuple(str(kind) for kind in listed)
    elif window is None or (family.window_switch and not config.get("use_sliding_window")):
        kinds = (FULL,) * layers
    elif family.window_switch:
        kinds = tuple(FULL if i < int(config.get("max_window_layers", layers)) else SLIDING for i in range(layers))
    elif family.sliding_every:
        every = int(config.get("sliding_window_pattern") or family.sliding_every)
        kinds = tuple(SLIDING if (i + 1) % every else FULL for i in range(layers))
    else:
        kinds = (SLIDING,) * layers
    return kinds, int(window or 0) if SLIDING in kinds else 0


def _ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary settings, one per kind of layer where kinds have their own."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
