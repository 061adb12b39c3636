"""Models for reading only in little memory: weights stay in one or two bytes each, and tokens come faster than dense.

Modules are exchanged as they are read, one after the other: the dense weights of a model are never there together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.models.checkpoint import load_model

if TYPE_CHECKING:
    from torch import Tensor, nn

STORED = {"F16", "F32"}
"""Types of dense weights that are held in two bytes; others are read as `load_model` does."""


def load_compact(folder: Path) -> Any:
    """The model of an a1q folder for generating on the CPU, in eval mode; a plain Hugging Face folder's is dense.

    Quantized linears and heads, also dense ones that an a1q folder holds, become `a1q.quant.compact.CompactLinear`,
    adapters beside them; embeddings look rows up in packed indices or in the file. Embeddings of schemes that say no
    rows by themselves stay what they are. It gives no gradients and can't be saved. `a1q.quant.compact.held_bytes`
    counts its memory.

    Raises:
        StageError: as `load_model`.
    """
    return load_model(folder, replace=_Compacting())


class _Compacting:
    """A `Replacement` by compact modules."""

    def quantized(self, model: Any, name: str) -> None:
        from a1q.quant.compact import CompactEmbedding, CompactLinear, compact_weight, says_rows
        from a1q.quant.embedding import QuantEmbedding
        from a1q.quant.linear import QuantLinear
        from a1q.quant.tied import TiedHead

        module = model.get_submodule(name)
        if isinstance(module, QuantLinear):
            _put(model, name, CompactLinear.of(module))
        if not isinstance(module, QuantEmbedding):
            return
        heads = [place for place, head in model.named_modules() if isinstance(head, TiedHead) and head.source is module]
        if heads:
            weight = compact_weight(module)
            for place in heads:
                _put(model, place, CompactLinear(weight, model.get_submodule(place).bias))
        if says_rows(module):
            _put(model, name, CompactEmbedding(module))

    def dense(self, model: Any, file: Path, header: Mapping[str, Any]) -> set[str]:
        from torch import nn

        from a1q.quant.compact import CompactLinear, weight_of_rows

        places: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Linear | nn.Embedding) and "weight" in module._parameters:
                places.setdefault(id(module._parameters["weight"]), []).append(name)
        done: set[str] = set()
        for names in places.values():
            stored = next((f"{name}.weight" for name in names if f"{name}.weight" in header), None)
            modules = {name: model.get_submodule(name) for name in names}
            if stored is None or not all(_is_replaced(module, header[stored]) for module in modules.values()):
                continue
            if any(isinstance(module, nn.Linear) for module in modules.values()):
                rows, columns = header[stored]["shape"]
                weight = weight_of_rows(_reader(file, stored), rows, columns)
            for name, module in modules.items():
                if isinstance(module, nn.Linear):
                    _put(model, name, CompactLinear(weight, module.bias))
                else:
                    _put(model, name, _looking_up(module, file, stored))
            done.add(stored)
        _untie(model)
        return done


def _is_replaced(module: nn.Module, entry: Mapping[str, Any]) -> bool:
    """Whether a dense module computes no more than we do, and its stored weight is what it needs."""
    from torch import nn

    plain = nn.Linear.forward if isinstance(module, nn.Linear) else nn.Embedding.forward
    ours = type(module).forward is plain or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"))
    return ours and entry["dtype"] in STORED and tuple(entry["shape"]) == tuple(module.weight.shape)  # type: ignore[arg-type]


def _looking_up(module: nn.Embedding, file: Path, stored: str) -> nn.Module:
    """An embedding that reads its rows from the file."""
    import torch
    from safetensors import safe_open

    from a1q.quant.compact import MappedEmbedding

    with safe_open(file, framework="pt") as tensors:
        rows = tensors.get_tensor(stored)  # mapped: what nobody looks up is not read
    scale = getattr(module, "embed_scale", None)
    return MappedEmbedding(rows, None if scale is None else torch.as_tensor(scale), module.weight.dtype)


def _reader(file: Path, stored: str) -> Any:
    """(start, stop) -> rows of a stored tensor; between calls nothing of the file is mapped."""
    from safetensors import safe_open

    def read(start: int, stop: int) -> Tensor:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_slice(stored)[start:stop].float()

    return read


def _put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _untie(model: Any) -> None:
    """Leave transformers nothing to tie: heads and embeddings share what is no parameter."""
    gone = {name for name in getattr(model, "all_tied_weights_keys", {}) if not _is_parameter(model, name)}
    ties = {head: tied for head, tied in getattr(model, "all_tied_weights_keys", {}).items() if head not in gone}
    model._tied_weights_keys = model.all_tied_weights_keys = ties


def _is_parameter(model: Any, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(owner)._parameters
