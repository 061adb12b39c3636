"""How many bytes each kind of thing takes in a model's files, from their headers. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from a1q.errors import MismatchError, StageError
from a1q.models.view import DENSE, ModelView, read_safetensors_header, weight_files
from a1q.quant.build import make_scheme

TABLES = "tables"
LATENT, ADAPTERS, EMBEDDINGS, LINEARS, OTHER = "latents", "adapters", "embeddings", "dense linears", "norms and biases"


def bytes_by_kind(folder: Path, view: ModelView) -> dict[str, int]:
    """Kind of tensor -> bytes: `indices`, `tables` and `scales` of quantized modules, and what is dense.

    Raises:
        MismatchError: if a file is damaged.
    """
    found: dict[str, int] = {}
    try:
        for file in weight_files(folder):
            for name, item in read_safetensors_header(file).items():
                if name != "__metadata__":
                    first, last = item["data_offsets"]
                    kind = kind_of(name, view)
                    found[kind] = found.get(kind, 0) + last - first
    except (StageError, ValueError, KeyError) as error:
        raise MismatchError(str(error)) from None
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def kind_of(name: str, view: ModelView) -> str:
    """What the tensor called `name` is, in the words of `bytes_by_kind`."""
    owner, _, part = name.rpartition(".")
    module = view.modules.get(owner)
    if module is not None and module.state != DENSE and part != "bias":
        if part == "latent":
            return LATENT
        if part in ("lora_A", "lora_B"):
            return ADAPTERS
        scheme = make_scheme(module.scheme or {})
        if part in scheme.integers:
            return "indices"
        sets = [label for label, parts in scheme.trainable.items() if part in parts]
        return TABLES if "lut" in sets or part.endswith("lut") else "scales"
    if part in ("lora_A", "lora_B"):
        return ADAPTERS
    if module is not None and part == "weight":
        return EMBEDDINGS if module.kind == "embedding" else LINEARS
    return EMBEDDINGS if re.search(r"embed|lm_head", owner) else OTHER
