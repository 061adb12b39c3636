"""A model with every weight written out in fp16: what plain `transformers` loads, whatever schemes said the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

FP16_MAX = 65504.0
SMALLEST_NORMAL = 2.0**-14
"""Below this the numbers of fp16 are evenly spaced, and no relative error can be asked of them."""


def fp16_state(model: nn.Module, progress: Callable[[int, int], None], merge: bool = False) -> dict[str, Tensor]:
    """The Hugging Face state dict with every weight dense in fp16; a tied head appears once, as the embedding.

    Weights are written out and rounded one by one: all of them in float32 would be twice the memory. With `merge`
    unmerged adapters are added before rounding; else they are left out.

    Raises:
        StageError: if a weight is not finite in fp16.
    """
    from a1q.quant.module import quantized_modules

    quantized = dict(quantized_modules(model))
    inside = tuple(f"{name}." for name in quantized)
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    state = {
        name: _fp16(name, tensor)
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside) and not (tied and name == "lm_head.weight")
    }
    for step, (name, module) in enumerate(quantized.items(), 1):
        weight = module.dequantize()
        if merge and module.adapter is not None:
            weight = weight + module.adapter_delta()
        state[f"{name}.weight"] = _fp16(f"{name}.weight", weight)
        if module.bias is not None:
            state[f"{name}.bias"] = _fp16(f"{name}.bias", module.bias)
        progress(step, len(quantized))
    return state


def save_baked(state: Mapping[str, Tensor], config: Any, folder: Path, tokenizer_from: Path) -> None:
    """Write a state dict of `fp16_state` as a Hugging Face folder; equal models give equal bytes."""
    from safetensors.torch import save_file

    from a1q.models.checkpoint import WEIGHTS, copy_companions, write_config

    save_file(dict(state), folder / WEIGHTS, metadata={"format": "pt"})
    write_config(config, folder, "float16")
    copy_companions(tokenizer_from, folder)


def largest_difference(exact: Tensor, baked: Tensor) -> float:
    """Max |Ŵ - fp16(Ŵ)| / |Ŵ|, where |Ŵ| counts as no less than fp16's smallest normal number; 2⁻¹¹ at most."""
    exact = exact.cpu().double()
    return float(((exact - baked.cpu().double()).abs() / exact.abs().clamp_min(SMALLEST_NORMAL)).max())


def _fp16(name: str, tensor: Tensor) -> Tensor:
    import torch

    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if not largest <= FP16_MAX:
        raise StageError(f"{name} does not fit FP16: its largest value is {largest:g}, FP16 ends at {FP16_MAX:g}")
    return tensor.detach().cpu().to(torch.float16).contiguous()  # rounding differs between devices
