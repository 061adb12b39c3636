"""A model as `plan` sees it: module names, shapes and states, read from headers without torch.

Planning walks a recipe over such views, so that a wrong module, order or scheme is found before anything runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a1q.errors import StageError

DENSE, QUANTIZED, SNAPPED = "dense", "quantized", "snapped"


@dataclass(frozen=True)
class ModuleView:
    """One linear or embedding of the model."""

    name: str
    shape: tuple[int, int]
    """[out, in] for a linear; [vocabulary, hidden] for an embedding."""
    kind: str = "linear"
    """`linear` or `embedding` (a tied head is the embedding)."""
    state: str = DENSE
    """`dense`, `quantized` or `snapped`."""
    scheme: Mapping[str, Any] | None = None
    """The complete scheme mapping (`{"scheme": "lut_lowrank", "bits": 4, ...}`), None while dense."""
    adapter: int = 0
    """Rank of an unmerged adapter; 0 for none."""
    latent: bool = False
    """Whether the file also holds the weight from which the indices are derived (float32)."""
    snapped_sets: tuple[str, ...] = ()
    """Parameter sets (`magnitudes`) of a quantized module that hold fp16-exact numbers, snapped before the rest."""
    alternatives: tuple[Mapping[str, Any], ...] = ()
    """While planning: the other complete schemes that `allocate` may choose instead of `scheme`, its largest."""


@dataclass(frozen=True)
class ModelView:
    """The model at one point of a recipe."""

    modules: Mapping[str, ModuleView]
    """By module name, in model order."""
    parameters: int
    """Number of parameters, tied ones counted once."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The Hugging Face config.json."""

    def replace(self, changed: Mapping[str, ModuleView]) -> ModelView:
        """The same model with some modules in another state."""
        return dataclasses.replace(self, modules={**self.modules, **changed})

    def variants(self) -> Iterator[ModelView]:
        """This view, then views in which every alternative of every module appears: as many as the longest list."""
        yield self
        for index in range(max((len(module.alternatives) for module in self.modules.values()), default=0)):
            yield self.replace(
                {
                    name: dataclasses.replace(module, scheme=module.alternatives[index])
                    for name, module in self.modules.items()
                    if index < len(module.alternatives)
                }
            )

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding (one parameter, named `model.embed_tokens`)."""
        return bool(self.config.get("tie_word_embeddings")) and "lm_head" not in self.modules


PREPARED = "a1q_prepared"
"""Entry of config.json: the techniques by which `prepare` stages changed the weights and not the function, in order."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Entries of config.json that planning reckons with, where they are there."""


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor name -> {dtype, shape, data_offsets}, plus `__metadata__`.

    Raises:
        ValueError: if the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        start = handle.read(8)
        if len(start) < 8:
            raise ValueError(f"{path} is not a safetensors file: it has {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8 or length > 100_000_000:
            raise ValueError(f"{path} is not a complete safetensors file: its header says {length} bytes")
        try:
            header = json.loads(handle.read(length))
            end = max((item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"), default=0)
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header can't be read ({error})") from None
    if 8 + length + end != size:
        raise ValueError(f"{path} is truncated or damaged: {size} bytes, its header needs {8 + length + end}")
    return header


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those of its index, or `model.safetensors`, or all there are.

    Some folders on the Hub hold the weights a second time under other names (Mistral's `consolidated.safetensors`).

    Raises:
        StageError: if there are none, one that the index names is missing, or the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StageError(f"{index} is damaged") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise StageError(f"{folder} lacks {', '.join(missing)}, which its index names")
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise StageError(f"{folder} has no .safetensors file; other weight formats are not read")
    return files


def read_view(folder: Path) -> ModelView:
    """The view of a model folder, a1q's own or plain Hugging Face, from `config.json` and safetensors headers.

    Modules come in natural order of their names (layer 2 before layer 10). A stored copy of a tied head is left out.

    Raises:
        StageError: if the folder is no model, or a file is damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{folder} is not a model: its config.json can't be read: {error}") from None
    if not isinstance(config, dict):
        raise StageError(f"{folder} is not a model: its config.json is no JSON object")
    for name in SIZES:
        if not isinstance(config.get(name, 0), int):
            raise StageError(f"{folder}: {name} in its config.json is {config[name]!r}, expected a whole number")
    files = weight_files(folder)
    shapes: dict[str, list[int]] = {}
    facts: dict[str, Any] = {}
    try:
        for file in files:
            header = read_safetensors_header(file)
            facts |= json.loads(header.pop("__metadata__", {}).get("a1q", "{}")).get("modules", {})
            shapes |= {name: item["shape"] for name, item in header.items()}
    except ValueError as error:
        raise StageError(str(error)) from None
    if config.get("tie_word_embeddings") and "lm_head" not in facts:
        shapes.pop("lm_head.weight", None)
    modules = {name: _quantized_view(name, fact, f"{name}.latent" in shapes) for name, fact in facts.items()}
    parameters = sum(math.prod(module.shape) for module in modules.values())
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        if owner in facts and leaf != "bias":
            continue
        parameters += math.prod(shape)
        if leaf == "weight" and len(shape) == 2:
            kind = "embedding" if re.search(r"embed|wte|wpe", owner.rpartition(".")[2]) else "linear"
            modules[owner] = ModuleView(owner, (shape[0], shape[1]), kind)
    return ModelView({name: modules[name] for name in sorted(modules, key=_natural)}, parameters, config)


def _quantized_view(name: str, fact: Mapping[str, Any], latent: bool) -> ModuleView:
    rows, columns = fact["shape"]
    adapter = (fact["adapter"] or {"rank": 0})["rank"]
    kind, sets = fact.get("kind", "linear"), tuple(fact.get("snapped_sets", ()))
    return ModuleView(name, (rows, columns), kind, fact["state"], fact["scheme"], adapter, latent, sets)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that counts: the numbers in a name compare as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
