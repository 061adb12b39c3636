"""The tensors of a checkpoint by the module they belong to, under the names that ANEMLL-QUANT-1 gives them.

| tensor of a module `M` | shape | in |
|---|---|---|
| `M.weight` | [out, in] | all; what indices are derived from while it trains |
| `M.bias` | [out] | where the architecture has one |
| `M.lut` | [L] | V1, V2 |
| `M.scale_A`, `M.scale_B` | [out, r], [r, in] (V1: [r, in padded to whole groups]) | V1, V2 |
| `M.rank_magnitude` | [r] | V2 |
| `M._indices` | [out, in] | V2, once frozen |
| `M._Q` | [out, in], the entries of `lut` | V2, once frozen |
| `M._scales_baked_flag` | a number | V2: 1 where `scale_A` and `scale_B` count as they are |
| `M._lut_raw_deltas` | [L / 2] | V2 whose table trains |
| `M.A_lut`, `M.B_lut`, `M._A_idx`, `M._B_idx` | [n], [n], [out, r], [r, in] | V2 whose factors are palettes |
| `M._f_param`, `M._qat_nbits` | a number each | Apple-style |
| `M.lora_A`, `M.lora_B` | [rank, in], [out, rank] | any, and alone |
| `M._cached_weight_q` | [out, in] | what the others say, once more; not read |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.engine.matching import summarize
from a1q.errors import MismatchError, Problem, UsageError
from a1q.importing.pickled import read_pickled

if TYPE_CHECKING:
    from torch import Tensor

BALANCED = ("_f_param", "_qat_nbits")
FACTORS = ("lut", "scale_A", "scale_B")
ONLY_V2 = ("rank_magnitude", "_indices", "_Q", "_scales_baked_flag", "_lut_raw_deltas")
PALETTES = ("A_lut", "B_lut", "_A_idx", "_B_idx")
LORA = ("lora_A", "lora_B")
UNREAD = ("_cached_weight_q", "_full_scales")
MARKS = frozenset((*BALANCED, *FACTORS, *ONLY_V2, *PALETTES, *LORA, *UNREAD, "full_scales"))
"""Tensors that only a module of theirs has."""
SHARED = ("weight", "bias")
DIMENSIONS = {
    **dict.fromkeys((*LORA, "weight", "scale_A", "scale_B", "_indices", "_Q", "_A_idx", "_B_idx"), 2),
    **dict.fromkeys(("bias", "lut", "rank_magnitude", "_lut_raw_deltas", "A_lut", "B_lut"), 1),
}
"""Of those parts that have a shape."""
KINDS = {"v1": "V1", "v2": "V2", "balanced": "Apple-style", "adapter": "LoRA"}
NESTED = ("model_state_dict", "model", "state_dict")
"""Entries under which a checkpoint that holds more than tensors keeps them."""
WHOLE = "model_state_dict.pt"
"""What their programs write last, and read where they are given a folder."""
CONFIGS = ("config.json", "v2_config.json", "quant_config.json", "training_args.json")


@dataclass(frozen=True)
class Stored:
    """One module of the checkpoint."""

    name: str
    kind: str
    """A key of `KINDS`; `adapter` where there is nothing but LoRA."""
    parts: Mapping[str, Tensor]
    indices: Tensor | None = None
    """[out, in], from a file of indices beside the checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read and sorted."""

    path: Path
    modules: Mapping[str, Stored]
    dense: Mapping[str, Tensor]
    """Tensors outside these modules, by name."""
    config: Mapping[str, Any]
    """What is said of the training, empty where nothing is."""
    config_from: str = ""
    """Where that stands, for messages."""
    unread: tuple[str, ...] = field(default=())
    """Files beside it that could have been meant."""

    @property
    def adapters_only(self) -> bool:
        """Whether it holds nothing but LoRA."""
        return not self.dense and all(module.kind == "adapter" for module in self.modules.values())


def read_checkpoint(path: Path, config: Path | None = None) -> Checkpoint:
    """Read a checkpoint, a `.pt` file or the folder of one.

    Args:
        path: in a folder `model_state_dict.pt` counts, or the only `.pt` file there is beside indices.
        config: what says how it was trained; by default what the file itself says, else the first of `CONFIGS` beside.

    Raises:
        UsageError: if there is no such file, or a folder holds several.
        MismatchError: if it can't be read without running code, is damaged, or is no such checkpoint.
    """
    file, unread = _find(path)
    loaded = read_pickled(file)
    state = _state(file, loaded)
    said, source = _config(file, loaded, config)
    modules, dense = _sorted(file, state)
    indices = _indices(file, modules)
    stored = {name: Stored(name, _kind(file, name, parts), parts, indices.get(name)) for name, parts in modules.items()}
    return Checkpoint(file, stored, dense, said, source, unread)


# -- files -------------------------------------------------------------------------------------------------------
def _find(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The file to read, and the names of others beside it."""
    if path.is_file():
        return path, ()
    if not path.is_dir():
        near = sorted(item.name for item in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        hint = f"; in {path.parent} there are {', '.join(near)}" if near else ""
        raise UsageError(f"there is no checkpoint {path}{hint}")
    files = sorted(item.name for item in path.glob("*.pt") if not item.name.endswith("indices.pt"))
    if WHOLE in files:
        return path / WHOLE, tuple(name for name in files if name != WHOLE)
    if len(files) == 1:
        return path / files[0], ()
    if files:
        raise UsageError(f"{path} holds several checkpoints; name one of them: {', '.join(files)}")
    if any(path.glob("*.safetensors")):
        raise UsageError(f"{path} is a model in safetensors, which recipes and commands take as it is")
    raise UsageError(f"{path} holds no .pt file")


def _state(file: Path, loaded: Any) -> dict[str, Tensor]:
    """The state dict, out of what was loaded."""
    import torch

    if isinstance(loaded, Mapping):
        for key in NESTED:
            inner = loaded.get(key)
            if isinstance(inner, Mapping):
                loaded = inner
                break
    if not isinstance(loaded, Mapping) or not loaded:
        raise MismatchError(f"{file} holds a {type(loaded).__name__}, expected the tensors of a model by name")
    tensors = {key for key, value in loaded.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    odd = [f"{key!r}" for key in loaded if key not in tensors]
    if odd:
        hint = f"tensors stand at the top of the file or under one of {', '.join(NESTED)}"
        raise MismatchError([Problem(f"{file}: {', '.join(odd[:4])} is no tensor; is it a checkpoint?", hint=hint)])
    return dict(loaded)


def _config(file: Path, loaded: Any, given: Path | None) -> tuple[Mapping[str, Any], str]:
    """What is said of the training, and where."""
    if given is None and isinstance(loaded, Mapping) and isinstance(loaded.get("config"), Mapping):
        return loaded["config"], f"{file}, entry `config`"
    if given is not None and not given.is_file():
        raise UsageError(f"there is no file {given}")
    for path in (given,) if given is not None else tuple(file.parent / name for name in CONFIGS):
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MismatchError(f"{path} can't be read: {error}") from None
        if not isinstance(config, dict):
            raise MismatchError(f"{path} holds no JSON object")
        if given is not None or "model_type" not in config:  # one of Hugging Face says nothing of the training
            return config, str(path)
    return {}, ""


def _indices(file: Path, modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Indices by module from the file that was written with this one."""
    import torch

    beside = file.with_name("indices.pt") if file.name == WHOLE else file.with_suffix(".indices.pt")
    if not beside.is_file():
        return {}
    found = read_pickled(beside)
    if not isinstance(found, Mapping) or not all(isinstance(item, torch.Tensor) for item in found.values()):
        raise MismatchError(f"{beside} holds no indices by module")
    if unknown := [str(name) for name in found if name not in modules]:
        raise MismatchError(f"{beside} names modules that {file.name} lacks: {', '.join(summarize(unknown))}")
    return dict(found)


# -- tensors -----------------------------------------------------------------------------------------------------
def _sorted(file: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(module -> part -> tensor, other tensors).

    Raises:
        MismatchError: if a number is not finite, or there is no module of theirs.
    """
    import torch

    owners = {key.rpartition(".")[0] for key in state if key.rpartition(".")[2] in MARKS}
    modules: dict[str, dict[str, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    for key, tensor in state.items():
        owner, _, part = key.rpartition(".")
        if part in UNREAD:
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise MismatchError(f"{file}: {key} holds {count:,} numbers that are not finite; training had diverged")
        if owner in owners and part in (*MARKS, *SHARED):
            modules.setdefault(owner, {})[part] = tensor
        else:
            dense[key] = tensor
    if not modules:
        message = f"{file} holds no quantized module and no adapter; it has {', '.join(list(state)[:4])}, ..."
        hint = "plain weights need no import: save them with `save_pretrained`, and name that folder as `model:`"
        raise MismatchError([Problem(message, hint=hint)])
    return modules, dense


def _kind(file: Path, name: str, parts: Mapping[str, Tensor]) -> str:
    """What sort of module this is.

    Raises:
        MismatchError: if parts are missing, or are of a kind that a1q has nothing for.
    """
    names = set(parts)
    if "full_scales" in names:
        message = f"{file}: {name} has `full_scales`, a number of its own for every weight"
        raise MismatchError([Problem(message, hint="a1q stores scales of low rank; train with a scale_rank above 0")])
    for part, tensor in parts.items():
        known = DIMENSIONS.get(part)
        if tensor.numel() != 1 if known is None else tensor.dim() != known:
            expected = "a single number" if known is None else f"{known} dimensions"
            raise MismatchError(f"{file}: {name}.{part} has the shape {list(tensor.shape)}, expected {expected}")
    if not names - {*LORA, *SHARED}:
        if names & set(SHARED):
            message = f"{file}: {name} is a dense module with an adapter"
            raise MismatchError([Problem(message, hint="a1q keeps adapters on quantized modules")])
        kind, needed = "adapter", set(LORA)
    elif names & set(BALANCED):
        kind, needed = "balanced", {*BALANCED, "weight"}
    elif names & {*ONLY_V2, *PALETTES}:
        kind, needed = "v2", {*FACTORS, "rank_magnitude"}
    else:
        kind, needed = "v1", {*FACTORS, "weight"}
    if kind == "v2" and not names & {"_indices", "_Q", "weight"}:
        needed.add("_indices")
    if names & set(LORA):
        needed |= set(LORA)
    if missing := sorted(needed - names):
        found = ", ".join(sorted(names))
        raise MismatchError(f"{file}: {name}, {KINDS[kind]}, lacks {', '.join(missing)}; it has {found}")
    return kind
