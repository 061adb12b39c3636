"""Models on disk: the only code that knows how dense and quantized modules are laid out in `model.safetensors`.

A quantized module `M` has its scheme's parts instead of `M.weight`: `M.indices` packed, the others by name, then
optionally `M.latent`, `M.lora_A`, `M.lora_B`. The header's single metadata entry `a1q` is JSON (`docs/architecture.md`,
kind `model`). One entry only: safetensors writes several in random order, and equal models must give equal bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from a1q.errors import StageError
from a1q.models.view import QUANTIZED, SNAPPED, read_safetensors_header, weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FORMAT = 1
WEIGHTS = "model.safetensors"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a Hugging Face folder that travel with a model unchanged."""


def save_model(model: Any, folder: Path, tokenizer_from: Path | None = None) -> None:
    """Write `model` to the existing `folder`: config, weights, and the tokenizer's files from another model folder.

    Dense parameters are stored in float32; in float16 once a module is snapped. Equal models give equal bytes.

    Raises:
        StageError: if a parameter is not finite (in float16: beyond its range).
    """
    import torch
    from safetensors.torch import save_file

    from a1q.quant.module import quantized_modules

    modules = dict(quantized_modules(model))
    snapped = any(module.state == SNAPPED for module in modules.values())
    dtype = torch.float16 if snapped else torch.float32
    tensors: dict[str, Tensor] = {}
    for name, tensor in _dense_tensors(model, modules).items():
        stored = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
            raise StageError(f"{name} holds values that are not finite in {str(dtype).removeprefix('torch.')}")
        tensors[name] = stored
    facts = {}
    for name, module in modules.items():
        tensors.update(_quantized_tensors(name, module))
        facts[name] = {
            "state": module.state,
            "scheme": module.spec,
            "shape": list(module.shape),
            "adapter": module.adapter,
            "fp16": module.straight_through_fp16,
            **({} if module.kind == "linear" else {"kind": module.kind}),
            **({"snapped_sets": list(module.snapped_sets)} if module.snapped_sets else {}),
        }
    header = json.dumps({"format": FORMAT, "modules": facts}, sort_keys=True)
    save_file(tensors, folder / WEIGHTS, metadata={"a1q": header})
    write_config(model.config, folder, "float16" if snapped else "float32")
    if tokenizer_from is not None:
        copy_companions(tokenizer_from, folder)


def write_config(config: Any, folder: Path, dtype: str) -> None:
    """Write config.json, weights being of `dtype`."""
    entries = config.to_dict()
    entries["dtype"] = dtype
    entries.pop("_name_or_path", None)  # where the model came from is no part of its content
    text = json.dumps(entries, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer and generation settings from one model folder to another, as far as they are there."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class Replacement(Protocol):
    """Puts other modules in place while an a1q folder is read: no two forms of all weights are ever there at once."""

    def dense(self, model: Any, file: Path, header: Mapping[str, Any]) -> set[str]:
        """Nothing has been read yet; say which tensors of `file`, whose header it is, need not be.

        They are the largest, and to be replaced while nothing else is there.
        """

    def quantized(self, model: Any, name: str) -> None:
        """The quantized module `name` has been read and is in place, but for its bias."""


def load_model(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    replace: Replacement | None = None,
) -> Any:
    """The model of an a1q folder or of a plain Hugging Face folder, in eval mode, with SDPA attention.

    Args:
        folder: nothing is looked up elsewhere.
        dtype: of dense parameters; float32 by default. Parts of quantized modules keep their own.
        replace: what puts other modules in place as those of an a1q folder are read.

    Raises:
        StageError: if the folder is no model, a file is damaged, tensors are missing, unexpected or of another
            shape; the message names them.
    """
    import torch

    dtype = dtype or torch.float32
    if not (folder / "config.json").is_file():
        raise StageError(f"{folder} is not a model: it has no config.json")
    headers = {file: _header(file) for file in weight_files(folder)}
    text = headers.get(folder / WEIGHTS, {}).get("__metadata__", {}).get("a1q")
    if text is None:
        model = _load_plain(folder, dtype)
    else:
        model = _load_own(folder, _facts(folder, text), dtype, headers[folder / WEIGHTS], replace)
    return model.to(device).eval()


# -- writing -----------------------------------------------------------------------------------------------------
def _dense_tensors(model: nn.Module, modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's own tensors, tied ones under their first name, without those inside quantized modules."""
    inside = tuple(f"{name}." for name in modules)
    seen: dict[int, str] = {}
    dense = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(inside) and name.rpartition(".")[2] != "bias":
            continue
        if seen.setdefault(id(tensor), name) == name:
            dense[name] = tensor
    return dense


def _quantized_tensors(name: str, module: Any) -> dict[str, Tensor]:
    """What is stored of one quantized module."""
    from a1q.quant.packing import pack

    stored = dict(module.parts())
    for part in stored.keys() & module.scheme.integers:
        stored[part] = pack(stored[part].cpu(), module.scheme.width(part))
    optional = {"latent": module.latent, "lora_A": module.lora_A, "lora_B": module.lora_B}
    stored.update({part: tensor for part, tensor in optional.items() if tensor is not None})
    return {f"{name}.{part}": tensor.detach().cpu().contiguous() for part, tensor in stored.items()}


# -- reading -----------------------------------------------------------------------------------------------------
def _header(file: Path) -> dict[str, Any]:
    try:
        return read_safetensors_header(file)
    except ValueError as error:
        raise StageError(str(error)) from None


def _facts(folder: Path, text: str) -> dict[str, Any]:
    """The modules' entry of the a1q header."""
    try:
        header = json.loads(text)
        version, modules = header["format"], header["modules"]
    except (ValueError, KeyError, TypeError):
        raise StageError(f"{folder / WEIGHTS}: its a1q header is damaged") from None
    if version != FORMAT:
        raise StageError(f"{folder / WEIGHTS}: format {version}; this a1q reads format {FORMAT}")
    return modules


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # every architecture's config class brings its own exceptions
        raise StageError(f"{folder / 'config.json'} is not understood: {error}") from None


def _load_plain(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    config = _config(folder)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError, AttributeError, TypeError) as error:  # damaged JSON beside it
        raise StageError(f"{folder} does not load: {error}") from None
    _refuse_differences(folder, found["missing_keys"], found["unexpected_keys"])
    return model


def _load_own(
    folder: Path,
    facts: Mapping[str, Any],
    dtype: torch.dtype,
    header: Mapping[str, Any],
    replace: Replacement | None,
) -> Any:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from a1q.quant.tied import swap_module

    with init_empty_weights(include_buffers=False):  # buffers that no file holds (rotary frequencies) are computed
        model = AutoModelForCausalLM.from_config(_config(folder), attn_implementation="sdpa", dtype=dtype)
    model.tie_weights()
    names = {name for name in header if name != "__metadata__"}
    used = set() if replace is None else replace.dense(model, folder / WEIGHTS, header)
    for name, fact in facts.items():
        try:
            dense = model.get_submodule(name)
        except AttributeError:
            raise StageError(f"{folder}: the model has no module {name}") from None
        with safe_open(folder / WEIGHTS, framework="pt") as file:  # closed again, pages that were read are given back
            module, taken = _read_quantized(folder, file, names, name, fact, dense)
        used |= taken
        swap_module(model, name, module)
        if replace is not None:
            replace.quantized(model, name)
        del module
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        expected = _dense_tensors(model, facts)
        _refuse_differences(folder, set(expected) - names, names - used - set(expected))
        for name, slot in expected.items():
            tensor = file.get_tensor(name)
            if tensor.shape != slot.shape:
                raise StageError(f"{folder}: {name} is {list(tensor.shape)}, the model needs {list(slot.shape)}")
            _assign(model, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    model.tie_weights()
    return model


def _read_quantized(
    folder: Path, file: Any, names: set[str], name: str, fact: Mapping[str, Any], dense: nn.Module
) -> tuple[Any, set[str]]:
    """What comes in the place of `dense`, and the tensor names it was read from.

    Its bias is read with the dense tensors. Its kind is the header's, `linear` where that names none.
    """
    from torch import nn

    from a1q.quant.build import make_scheme
    from a1q.quant.embedding import QuantEmbedding
    from a1q.quant.linear import QuantLinear
    from a1q.quant.module import QuantModule
    from a1q.quant.packing import packed_size, unpack

    kinds: dict[str, tuple[type[QuantModule], type[nn.Module]]]
    kinds = {"linear": (QuantLinear, nn.Linear), "embedding": (QuantEmbedding, nn.Embedding)}
    kind = fact.get("kind", "linear")
    if kind not in kinds or not isinstance(dense, kinds[kind][1]):
        raise StageError(f"{folder}: {name} is called a {kind}, the model's is a {type(dense).__name__}")

    shape, spec, state = tuple(fact["shape"]), fact["scheme"], fact["state"]
    if state not in (QUANTIZED, SNAPPED):
        raise StageError(f"{folder}: {name} has the unknown state {state!r}")
    scheme = make_scheme(spec)
    indices = shape[0] // scheme.vector, shape[1]
    wanted: dict[str, tuple[int, ...]] = {"indices": indices, **scheme.part_shapes(shape, snapped=state == SNAPPED)}
    packed = {part: wanted[part] for part in scheme.integers if part in wanted}
    wanted |= {part: (packed_size(math.prod(size), scheme.width(part)),) for part, size in packed.items()}
    adapter = fact["adapter"]
    if adapter is not None:
        wanted["lora_A"], wanted["lora_B"] = (adapter["rank"], shape[1]), (shape[0], adapter["rank"])
    if f"{name}.latent" in names:
        wanted["latent"] = shape
    _refuse_differences(folder, {f"{name}.{part}" for part in wanted} - names, ())
    tensors = {}
    for part, part_shape in wanted.items():
        tensor = file.get_tensor(f"{name}.{part}")
        if tuple(tensor.shape) != tuple(part_shape):
            raise StageError(f"{folder}: {name}.{part} is {list(tensor.shape)}, its scheme needs {list(part_shape)}")
        tensors[part] = tensor
    for part, size in packed.items():
        try:
            tensors[part] = unpack(tensors[part], scheme.width(part), size)
        except ValueError as error:
            raise StageError(f"{folder}: {name}.{part}: {error}") from None
    latent = tensors.pop("latent", None)
    lora = tensors.pop("lora_A", None), tensors.pop("lora_B", None)
    module = kinds[kind][0].in_place_of(dense, spec, tensors, latent, state)
    module.straight_through_fp16 = fact["fp16"]
    module.snapped_sets = tuple(fact.get("snapped_sets", ()))
    if adapter is not None:
        module.set_adapter(*lora, adapter["alpha"])
    return module, {f"{name}.{part}" for part in wanted}


def _refuse_differences(folder: Path, missing: Any, unexpected: Any) -> None:
    """Raise `StageError` that names the tensors, if there are any."""
    for word, names in (("lacks", sorted(missing)), ("holds unexpected", sorted(unexpected))):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise StageError(f"{folder} {word} {', '.join(names[:8])}{more}")


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the parameter or buffer `name` is."""
    from torch import nn

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        setattr(module, leaf, tensor)
