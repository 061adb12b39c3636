"""A checkpoint put into its base model, and written as a folder that recipes and commands take."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.engine.artifact import sha256_file
from a1q.engine.files import fsync_path, fsync_tree, remove_tree, told_disk_errors
from a1q.engine.matching import summarize
from a1q.errors import MismatchError, Problem, UsageError
from a1q.importing.balanced import read_balanced
from a1q.importing.checkpoint import KINDS, LORA, Checkpoint, Stored
from a1q.importing.meaning import Meaning
from a1q.importing.settings import Settings
from a1q.importing.v1 import read_v1
from a1q.importing.v2 import read_v2
from a1q.models.view import DENSE, ModelView, read_view

if TYPE_CHECKING:
    from torch import Tensor, nn

RECORD = "imported.json"
"""In the written folder: what it was made of, and how."""
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


@dataclass
class Report:
    """What was found while a checkpoint was read."""

    modules: dict[str, str] = field(default_factory=dict)
    """Module -> its kind, a key of `KINDS`."""
    schemes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    adapters: dict[str, int] = field(default_factory=dict)
    """Module -> rank of its adapter."""
    weights: int = 0
    """Entries of all modules."""
    derived: list[str] = field(default_factory=list)
    """Modules whose indices were not stored."""
    differing: dict[str, int] = field(default_factory=dict)
    """What was done about entries that are stored twice and differ -> how many."""
    floored: dict[str, int] = field(default_factory=dict)
    """Module -> entries that V1 floors."""
    floored_error: float = 0.0
    latents: int = 0
    from_base: list[str] = field(default_factory=list)
    """Tensors that the checkpoint lacks, and that are the base's."""
    untied: bool = False

    def add(self, module: Stored, meaning: Meaning) -> None:
        """Count one module."""
        name = module.name
        self.modules[name], self.schemes[name] = module.kind, meaning.spec
        self.weights += meaning.parts["indices"].numel()
        self.latents += meaning.latent is not None
        if not meaning.carried:
            self.derived.append(name)
        if meaning.differing:
            self.differing[meaning.note] = self.differing.get(meaning.note, 0) + meaning.differing
        if meaning.floored:
            self.floored[name] = meaning.floored
            self.floored_error = max(self.floored_error, meaning.floored_error)

    def kinds(self) -> dict[str, int]:
        """How many modules there are of each kind, in the words of `KINDS`."""
        return {KINDS[kind]: count for kind, count in Counter(self.modules.values()).items()}


def import_model(
    checkpoint: Checkpoint,
    settings: Settings,
    base: Path,
    keep_latents: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, Report]:
    """The base model with what the checkpoint says in the place of its weights.

    Args:
        base: folder of the dense model that was trained.
        keep_latents: keep the weights from which indices are derived, where there are any, so that weights can go on
            training.
        progress: called with (modules done, all).

    Raises:
        MismatchError: if the checkpoint is of another architecture, lacks modules, or says what a1q has no word for.
    """
    from a1q.models.checkpoint import load_model
    from a1q.quant.linear import QuantLinear
    from a1q.quant.tied import swap_module

    view = read_view(base)
    require_fit(checkpoint, view)
    alpha = require_alpha(checkpoint, settings)
    report = Report()
    model = load_model(base)
    report.untied = _untie(model, checkpoint)
    report.from_base = _put_dense(model, checkpoint)
    for number, (name, module) in enumerate(checkpoint.modules.items(), 1):
        meaning = _read(module, settings)
        if not keep_latents:
            meaning = Meaning(**{**vars(meaning), "latent": None})
        dense = model.get_submodule(name)
        if dense.bias is not None and "bias" in module.parts:
            dense.bias.data = module.parts["bias"].float()
        quantized = QuantLinear.in_place_of(dense, meaning.spec, meaning.parts, meaning.latent)
        if "lora_A" in module.parts:
            lora_a, lora_b = (module.parts[part].float() for part in LORA)
            quantized.set_adapter(lora_a, lora_b, alpha)
            report.adapters[name] = len(lora_a)
        swap_module(model, name, quantized)
        report.add(module, meaning)
        progress(number, len(checkpoint.modules))
    return model.eval(), report


def _read(module: Stored, settings: Settings) -> Meaning:
    if module.kind == "v1":
        return read_v1(module, settings)
    return read_v2(module, settings) if module.kind == "v2" else read_balanced(module)


# -- does it fit -------------------------------------------------------------------------------------------------
def require_fit(checkpoint: Checkpoint, view: ModelView) -> None:
    """Refuse a checkpoint that is of another model than `view`, or lacks part of one.

    Raises:
        MismatchError: with every sort of difference, modules and tensors named.
    """
    problems = [*_misplaced(checkpoint, view), *_missing(checkpoint, view)]
    if problems:
        size = f"{view.config.get('num_hidden_layers')} layers, hidden size {view.config.get('hidden_size')}"
        hint = f"is the base ({view.config.get('model_type')}, {size}) the model that was trained?"
        raise MismatchError([Problem(f"{checkpoint.path}: {text}", hint=hint) for text in problems])


def _misplaced(checkpoint: Checkpoint, view: ModelView) -> Iterator[str]:
    """Modules that the base has not, or has in another shape, or not dense."""
    own = dict(view.modules)
    if view.tied and EMBEDDING in own:
        own[HEAD] = own[EMBEDDING]
    unknown = [name for name in checkpoint.modules if name not in own]
    if unknown:
        yield f"the base has no {', '.join(summarize(unknown))}"
    odd = {}
    for name, module in checkpoint.modules.items():
        if name in own and (shape := shape_of(module)) != own[name].shape:
            odd[name] = f"{list(shape)} here and {list(own[name].shape)} in the base"
    if odd:
        first = next(iter(odd))
        yield f"{', '.join(summarize(odd))}: other shapes than the base's, {first} is {odd[first]}"
    quantized = [name for name in checkpoint.modules if name in own and own[name].state != DENSE]
    if quantized and not checkpoint.adapters_only:
        yield f"the base is quantized already: {', '.join(summarize(quantized))}"
    embeddings = [name for name in checkpoint.modules if name in own and own[name].kind != "linear" and name != HEAD]
    if embeddings:
        yield f"{', '.join(summarize(embeddings))} are no linears in the base"


def _missing(checkpoint: Checkpoint, view: ModelView) -> Iterator[str]:
    """Modules that are quantized in other layers, and of which nothing is there."""
    if checkpoint.adapters_only:
        return
    roles = {_role(name) for name in checkpoint.modules}
    missing = [
        name
        for name in view.modules
        if _role(name) in roles and name not in checkpoint.modules and f"{name}.weight" not in checkpoint.dense
    ]
    if missing:
        yield f"nothing of {', '.join(summarize(missing))}, which are quantized in other layers"
    partly = {name for name, module in checkpoint.modules.items() if module.kind == "adapter"}
    if partly:
        yield f"{', '.join(summarize(partly))} have an adapter and nothing else"


def _role(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def shape_of(module: Stored) -> tuple[int, int]:
    """(out, in) as the first part that tells both says."""
    for part in ("weight", "_indices", "_Q"):
        if part in module.parts:
            rows, columns = module.parts[part].shape
            return rows, columns
    left, right = LORA[::-1] if module.kind == "adapter" else ("scale_A", "scale_B")
    return module.parts[left].shape[0], module.parts[right].shape[1]


def require_alpha(checkpoint: Checkpoint, settings: Settings) -> float:
    """The alpha of the adapters; 0 where there are none.

    Raises:
        MismatchError: if nothing says it, or an adapter's shapes do not fit its module.
    """
    having = {name: module for name, module in checkpoint.modules.items() if "lora_A" in module.parts}
    for name, module in having.items():
        a, b = (module.parts[part] for part in LORA)
        rows, columns = shape_of(module)
        if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != (rows, columns):
            shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
            raise MismatchError(f"{checkpoint.path}: {name}: {shapes} don't make {[rows, columns]}")
    if having and settings.alpha is None:
        rank = len(next(iter(having.values())).parts["lora_A"])
        hint = f"say it: --alpha {rank} where it was not set (their default is the rank)"
        message = f"{checkpoint.path} holds adapters, and nothing says their alpha (`lora_alpha` of a config beside it)"
        raise MismatchError([Problem(message, hint=hint)])
    return settings.alpha or 0.0


# -- dense tensors -----------------------------------------------------------------------------------------------
def _untie(model: Any, checkpoint: Checkpoint) -> bool:
    """Give the head a weight of its own where the checkpoint has one that is not the embedding's."""
    import torch
    from torch import nn

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    own, shared = checkpoint.dense.get(f"{HEAD}.weight"), checkpoint.dense.get(f"{EMBEDDING}.weight")
    apart = own is not None and (shared is None or own.shape != shared.shape or not torch.equal(own, shared))
    if HEAD not in checkpoint.modules and not apart:
        return False
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = model.all_tied_weights_keys = {}
    return True


def _put_dense(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Copy the checkpoint's dense tensors into the model; returns the names of those that the base keeps.

    Raises:
        MismatchError: if the base lacks one or has it in another shape, or a whole checkpoint lacks one of the base's.
    """
    import torch

    inside = tuple(f"{name}." for name in checkpoint.modules)
    slots: dict[str, Tensor] = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not name.startswith(inside)
    }
    unknown = [name for name in checkpoint.dense if name not in slots]
    if unknown:
        raise MismatchError(f"{checkpoint.path}: the base has no {', '.join(summarize(unknown))}")
    for name, tensor in checkpoint.dense.items():
        if tensor.shape != slots[name].shape:
            shapes = f"{list(tensor.shape)}, in the base {list(slots[name].shape)}"
            raise MismatchError(f"{checkpoint.path}: {name} is {shapes}")
    with torch.no_grad():
        for name, tensor in checkpoint.dense.items():
            slots[name].copy_(tensor)
    filled = {id(slots[name]) for name in checkpoint.dense}  # a tied head is the embedding, in both
    kept = list({id(slot): name for name, slot in reversed(slots.items()) if id(slot) not in filled}.values())[::-1]
    biases = [
        f"{name}.bias"
        for name, module in checkpoint.modules.items()
        if "bias" not in module.parts and getattr(model.get_submodule(name), "bias", None) is not None
    ]
    odd = [
        f"{name}.bias"
        for name, module in checkpoint.modules.items()
        if "bias" in module.parts and getattr(model.get_submodule(name), "bias", None) is None
    ]
    if odd:
        raise MismatchError(f"{checkpoint.path}: the base has no {', '.join(summarize(odd))}")
    if (kept and checkpoint.dense) or biases:
        raise MismatchError(f"{checkpoint.path} lacks {', '.join(summarize([*kept, *biases]))}")
    return kept


# -- writing -----------------------------------------------------------------------------------------------------
def refuse_existing(out: Path) -> None:
    """Refuse a place where no new folder can be.

    Raises:
        UsageError: if `out` is there already and not an empty folder, or below a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already; name a new folder (-o DIR)")
    above = _existing(out)
    if not above.is_dir():
        raise UsageError(f"{out} can't be written: {above} is no folder")


def _existing(out: Path) -> Path:
    """The nearest thing above `out` that is there."""
    return next(path for path in out.absolute().parents if path.exists())


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out`, in folders that are made for it, when the block ends well, and is
    gone otherwise.

    Raises:
        UsageError: as `refuse_existing`.
        StageError: if the disk is full or read-only.
    """
    refuse_existing(out)
    above = _existing(out)
    aside = above / f".{out.name}.{os.getpid()}"
    with told_disk_errors(above):
        remove_tree(aside)
        aside.mkdir()
        try:
            yield aside
            fsync_tree(aside)
            if out.is_dir():
                out.rmdir()
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            aside.rename(out)
            fsync_path(out.absolute().parent)
        finally:
            remove_tree(aside)


def write_model(
    model: Any, folder: Path, checkpoint: Checkpoint, settings: Settings, report: Report, base: Path
) -> None:
    """Write the model, the base's tokenizer and `imported.json` into an existing folder."""
    from a1q.models.checkpoint import save_model

    save_model(model, folder, tokenizer_from=base)
    record = {
        "format": 1,
        "checkpoint": {"name": checkpoint.path.name, "sha256": sha256_file(checkpoint.path)},
        "kinds": report.kinds(),
        "settings": asdict(settings),
        "config": hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode()).hexdigest(),
        "derived_indices": len(report.derived),
        "differing": report.differing,
        "floored": report.floored,
        "floored_error": report.floored_error,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
