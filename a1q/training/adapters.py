"""LoRA adapters: attached and trained as plain PEFT, kept in quantized modules, written as a PEFT folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER = "default"


def attach_adapters(model: nn.Module, names: Iterable[str], rank: int, alpha: float, dropout: float) -> Any:
    """Wrap the named linears of `model` with LoRA; only the adapters require gradients.

    Returns:
        The `PeftModel`; its `unload()` gives `model` back without adapters.
    """
    from peft import get_peft_model

    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, _lora_config(dict.fromkeys(names, (rank, alpha)), dropout))


def fill_adapters(peft_model: Any, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Let wrapped linears begin with their B A [out, in], of A [rank, in] and B [out, rank], whatever their alpha.

    Those that `tensors` doesn't name stay as they are.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for name, layer in peft_model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer) and name in tensors:
                each = abs(layer.scaling[ADAPTER]) ** 0.5
                for part, tensor in zip((layer.lora_A, layer.lora_B), tensors[name], strict=True):
                    part[ADAPTER].weight.copy_(tensor / each)


def adapter_tensors(peft_model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of the wrapped linear -> A [rank, in], B [out, rank]."""
    from peft.tuners.lora import LoraLayer

    return {
        name: (layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach())
        for name, layer in peft_model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


def save_peft_adapter(model: nn.Module, folder: Path) -> None:
    """Write the unmerged adapters of a model's quantized modules as PEFT does.

    `PeftModel.from_pretrained(base, folder)` then computes on the exported Hugging Face folder what `model` computes.
    """
    from a1q.quant.module import quantized_modules

    write_peft_folder(
        {
            name: (module.lora_A, module.lora_B, module.adapter_alpha)
            for name, module in quantized_modules(model)
            if module.lora_A is not None and module.lora_B is not None
        },
        folder,
    )


def write_peft_folder(adapters: Mapping[str, tuple[Tensor, Tensor, float]], folder: Path) -> None:
    """Write adapters as PEFT does: name of a linear -> A [rank, in], B [out, rank] and alpha."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for name, (lora_a, lora_b, alpha) in adapters.items():
        sizes[name] = (len(lora_a), alpha)
        for part, tensor in (("lora_A", lora_a), ("lora_B", lora_b)):
            tensors[f"base_model.model.{name}.{part}.weight"] = tensor.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = _lora_config(sizes, dropout=0.0)
    config.inference_mode = True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"  # PEFT writes a set in the order of this process's hashes
    document = json.loads(path.read_text(encoding="utf-8"))
    document["target_modules"].sort()
    path.write_text(json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")


def _lora_config(sizes: dict[str, tuple[int, float]], dropout: float) -> Any:
    from peft import LoraConfig

    rank, alpha = next(iter(sizes.values()))
    odd = {name: size for name, size in sizes.items() if size != (rank, alpha)}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(sizes),
        rank_pattern={name: size[0] for name, size in odd.items()},
        alpha_pattern={name: size[1] for name, size in odd.items()},
        task_type="CAUSAL_LM",
    )
