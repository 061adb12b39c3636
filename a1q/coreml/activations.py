"""The largest activations of a decoder on real text, layer by layer, and the residual scale that keeps them in fp16.

What reaches the residual stream may grow to 10^5 and more in a trained model, Gemma's above all, where fp16 ends at
65504. Every reader of the stream is an RMSNorm, which doesn't see a common factor (but for its epsilon). So the stream
may be carried as α times itself, α < 1: the embedding's output and all that is added to it times α, epsilon times α².
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from a1q.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from a1q.coreml.operations import Array

LARGEST_FP16 = 65504.0
MARGIN = 8.0
"""How far below the largest fp16 number peaks are kept: other text has larger ones."""


@dataclass(frozen=True)
class LayerPeaks:
    """Largest magnitudes in one layer, over all positions and channels, unscaled."""

    residual: float
    """The stream as it enters the layer; in the first layer the embedding, scaled where the family scales it."""
    query: float
    """Before the rotation (which adds up to a factor √2), after the norm where the family has one."""
    key: float
    attention: float
    """What o_proj takes."""
    attention_output: float
    """What o_proj gives."""
    attention_added: float
    """What is added to the stream: o_proj's output, or that of the norm behind it."""
    residual_middle: float
    """The stream between attention and MLP."""
    product: float
    """What down_proj takes."""
    product_output: float
    """What down_proj gives."""
    product_added: float
    """What is added to the stream: down_proj's output, or that of the norm behind it."""
    residual_end: float
    """The stream as it leaves the layer."""


STREAM = (
    "residual",
    "attention_output",
    "attention_added",
    "residual_middle",
    "product",
    "product_output",
    "product_added",
    "residual_end",
)
"""The peaks that a residual scale lowers: `a1q.coreml.decoder` shrinks a branch from what its last projection takes."""


@dataclass(frozen=True)
class Peaks:
    """Largest magnitudes of a model on some text."""

    tokens: int
    layers: tuple[LayerPeaks, ...]
    logits: float

    def stream(self) -> float:
        """The largest number in the residual stream and in what leads to it."""
        return max(getattr(layer, name) for layer in self.layers for name in STREAM)

    def beyond(self, limit: float = LARGEST_FP16) -> list[str]:
        """What exceeds `limit` and no residual scale lowers, as `layer 3: product 80000`."""
        others = [field.name for field in fields(LayerPeaks) if field.name not in STREAM]
        return [
            f"layer {index}: {name.replace('_', ' ')} {getattr(layer, name):.0f}"
            for index, layer in enumerate(self.layers)
            for name in others
            if getattr(layer, name) > limit
        ]

    def as_json(self) -> dict[str, Any]:
        """`{"tokens", "logits", "layers": [{"residual", ...}, ...]}`."""
        return asdict(self)


def measure(model: nn.Module, tokens: Array) -> Peaks:
    """Run a Hugging Face decoder over token sequences and note the largest magnitudes.

    Args:
        model: Qwen3, Qwen2, Llama, Mistral or Gemma 3 (text), dense or quantized; left in the mode it came in.
        tokens: integers [n, L] of real text, as the model's tokenizer gives it: where text begins with a special
            token, that token tends to have the largest activations of all. One sequence is run at a time.

    Raises:
        StageError: if an activation is not finite.
    """
    import torch

    device = next(model.parameters()).device
    layers: Any = model.model.layers  # type: ignore[union-attr]
    found: list[dict[str, float]] = [{field.name: 0.0 for field in fields(LayerPeaks)} for _ in layers]
    logits, training = 0.0, model.training
    handles = [handle for layer, row in zip(layers, found, strict=True) for handle in _watch(layer, row)]
    model.eval()
    try:
        with torch.inference_mode():
            for sequence in tokens:
                ids = torch.as_tensor(sequence.astype("int64"), device=device)[None]
                logits = _larger(logits, model(input_ids=ids, use_cache=False).logits)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    peaks = Peaks(int(tokens.size), tuple(LayerPeaks(**row) for row in found), logits)
    for index, row in enumerate(found):
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        if broken:
            raise StageError(f"layer {index}: {broken[0].replace('_', ' ')} is not finite even in float32")
    return peaks


def residual_scale(peaks: Peaks, margin: float = MARGIN) -> float:
    """The power of two α ≤ 1 with which the residual stream and what leads to it stay `margin` below fp16's end.

    1.0 where nothing is needed. A power of two, so that no number is rounded anew as long as it is not subnormal.
    """
    excess = peaks.stream() * margin / LARGEST_FP16
    return 1.0 if excess <= 1 else 2.0 ** -math.ceil(math.log2(excess))


def _watch(layer: Any, row: dict[str, float]) -> Iterator[Any]:
    """Hook one decoder layer so that its peaks go to `row`; yields the handles.

    A family with norms behind its branches (Gemma 3) calls the norm before its MLP `pre_feedforward_layernorm` and
    adds what the norms behind the branches give; the others add what the projections give.
    """
    attention, mlp = layer.self_attn, layer.mlp
    behind = hasattr(layer, "pre_feedforward_layernorm")
    before_mlp = layer.pre_feedforward_layernorm if behind else layer.post_attention_layernorm
    yield _input(layer, row, "residual")
    yield _output(getattr(attention, "q_norm", attention.q_proj), row, "query")
    yield _output(getattr(attention, "k_norm", attention.k_proj), row, "key")
    yield _input(attention.o_proj, row, "attention")
    yield _output(attention.o_proj, row, "attention_output")
    yield _output(layer.post_attention_layernorm if behind else attention.o_proj, row, "attention_added")
    yield _input(before_mlp, row, "residual_middle")
    yield _input(mlp.down_proj, row, "product")
    yield _output(mlp.down_proj, row, "product_output")
    yield _output(layer.post_feedforward_layernorm if behind else mlp.down_proj, row, "product_added")
    yield _output(layer, row, "residual_end")


def _input(module: nn.Module, row: dict[str, float], name: str) -> Any:
    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        row[name] = _larger(row[name], args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(note, with_kwargs=True)


def _output(module: nn.Module, row: dict[str, float], name: str) -> Any:
    def note(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        row[name] = _larger(row[name], output)

    return module.register_forward_hook(note)


def _larger(peak: float, tensor: Tensor) -> float:
    """`peak` or the largest magnitude of `tensor`; NaN stays."""
    found = float(tensor.detach().abs().max())
    return found if math.isnan(found) else max(peak, found)
