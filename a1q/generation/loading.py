"""From what a person names to something that writes: model, package or adapter, with its tokenizer."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from a1q.errors import MismatchError, StageError, UsageError
from a1q.generation.writers import ModelWriter, PackageWriter, Writer
from a1q.models.adapter_source import CONFIG as ADAPTER

if TYPE_CHECKING:
    import torch

    from a1q.data.chat import Chat


@dataclass(frozen=True)
class Voice:
    """What writes, and how it reads."""

    folder: Path
    """Of the model or package; of an adapter, its base's."""
    writer: Writer
    tokenizer: Any
    """Of transformers."""
    ends: list[int]
    """Tokens that end a text."""
    weights: str = ""
    """How they are held, for people, where they are compact."""

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, with what the tokenizer puts before every text.

        Raises:
            MismatchError: if there are none.
            UsageError: if the model doesn't know one.
        """
        found: list[int] = self.tokenizer(text)["input_ids"]
        if not found:  # without its files transformers makes a tokenizer of no words
            message = f"the tokenizer of {self.folder} finds no token in the prompt; is its tokenizer.json there?"
            raise MismatchError(message)
        return self._known(found)

    def chat_tokens(self, text: str) -> list[int]:
        """Tokens of what a chat template wrote, which holds all there is.

        Raises:
            UsageError: if the model doesn't know one.
        """
        return self._known(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _known(self, found: list[int]) -> list[int]:
        if max(found, default=0) >= self.writer.vocabulary:
            odd = self.tokenizer.decode([max(found)])
            raise UsageError(f"the prompt has a token that this model does not know: {odd!r}")
        return found

    def chat(self, thinking: bool | None) -> Chat:
        """The chat template, which is told about thinking.

        Raises:
            MismatchError: if there is none, or it can't be told.
        """
        from a1q.data.chat import Chat
        from a1q.data.sequences import load_tokenizer
        from a1q.errors import Problem

        if self.tokenizer.chat_template is None:
            hint = "`a1q generate` continues plain text; to chat, take a model that was trained to"
            raise MismatchError([Problem(f"the tokenizer in {self.folder} has no chat template", hint=hint)])
        return Chat(self.folder, load_tokenizer(self.folder)[0], thinking)

    def ends_of(self, chat: Chat) -> list[int]:
        """Tokens that end an answer: those that end a text, and what its template ends answers with."""
        return self.ends if chat.end is None or chat.end in self.ends else [*self.ends, chat.end]

    def doubt(self, chat: Chat) -> str:
        """A line for people where the model's own settings know nothing of the template; empty where they do."""
        if chat.end is None or chat.end in self.ends:
            return ""
        end = self.tokenizer.convert_ids_to_tokens(chat.end)
        return f"{end} ends answers by the chat template and no text by the model's settings: was it trained to chat?"


def open_voice(
    name: str,
    base: str | None = None,
    device: str = "auto",
    precision: Literal["fp32", "fp16"] = "fp16",
    dense: bool = False,
) -> Voice:
    """Load what `name` means.

    Args:
        name: as `a1q.models.locate.locate_folder` takes it, or a folder with a PEFT adapter.
        base: model that the adapter belongs to; None takes the one that its config names.
        device: of models; packages are run by Core ML, or interpreted on the CPU.
        precision: how the interpreter rounds.
        dense: write weights of quantized models out, also on the CPU (`a1q.models.compact` says what else happens).

    Raises:
        UsageError: if a package is asked to run on another device, or a model gets a base.
        MismatchError: if it can't be found or loaded, or there is no such device here.
    """
    from a1q.models.locate import is_core_ml, locate_folder, locate_model

    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the libraries between our lines
    path = Path(name).expanduser()
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        return _model(locate_model(base or _base_of(path)), device, dense, adapter=path)
    if base is not None:
        raise UsageError(f"--base is for adapters, and {name} is none: it has no {ADAPTER}")
    folder = locate_folder(name)
    if is_core_ml(folder):
        if device != "auto":
            raise UsageError(f"--device {device} is for models; {folder} is a Core ML package")
        if dense:
            raise UsageError(f"--dense is for models; {folder} is a Core ML package")
        return _package(folder, precision)
    return _model(folder, device, dense)


def find_device(asked: str) -> torch.device:
    """The device to compute on.

    Raises:
        MismatchError: if it is not there.
    """
    import torch

    from a1q.training.device import available_devices

    found = available_devices()
    if asked not in ("auto", *found):
        raise MismatchError(f"--device {asked}: this machine has {', '.join(found)}")
    return torch.device(found[-1] if asked == "auto" else asked)


def find_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, by transformers.

    Raises:
        MismatchError: if it can't be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MismatchError(f"the tokenizer of {folder} can't be loaded: {reason}") from None


def _model(folder: Path, device: str, dense: bool, adapter: Path | None = None) -> Voice:
    from a1q.models.checkpoint import load_model
    from a1q.models.compact import load_compact
    from a1q.models.dense import write_out
    from a1q.quant.compact import described

    place, tokenizer = find_device(device), find_tokenizer(folder)
    try:
        model = load_model(folder, device=place) if dense or place.type != "cpu" else load_compact(folder)
    except StageError as error:
        raise MismatchError(str(error)) from None
    write_out(model)
    if adapter is not None:
        _add(model, adapter)
    ends = _ends(folder, tokenizer, model.config.eos_token_id)
    return Voice(folder, ModelWriter(model), tokenizer, ends, described(model))


def _package(folder: Path, precision: Literal["fp32", "fp16"]) -> Voice:
    from a1q.coreml.bundle import TOKENIZER, read_bundle
    from a1q.coreml.device import CoreMLBackend, available
    from a1q.coreml.runner import InterpreterBackend, make_runner

    bundle = read_bundle(folder)
    if not (folder / TOKENIZER).is_file():
        raise MismatchError(f"{folder} has no {TOKENIZER}, without which a package understands no text")
    tokenizer = find_tokenizer(folder)
    ends = _ends(folder, tokenizer, bundle.meta.get("eos_token_id"))
    backend = CoreMLBackend(bundle) if available() is None else InterpreterBackend(bundle, precision)
    return Voice(folder, PackageWriter(make_runner(bundle, backend), backend.name), tokenizer, ends)


def _base_of(adapter: Path) -> str:
    """The model that an adapter's config names.

    Raises:
        UsageError: if it names none.
    """
    try:
        named = json.loads((adapter / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise MismatchError(f"{adapter / ADAPTER} is damaged: {error}") from None
    if not named:
        raise UsageError(f"{adapter} is an adapter that doesn't name its model; say it with --base MODEL")
    return str(named)


def _add(model: Any, adapter: Path) -> None:
    """Add an adapter to the weights of a model whose linears are dense, or beside those that are compact.

    Raises:
        MismatchError: if it is that of another model.
    """
    import torch
    from torch import nn

    from a1q.models.adapter_source import read_adapter, resolve_adapter
    from a1q.quant.compact import CompactLinear

    linears = {item: module for item, module in model.named_modules() if isinstance(module, nn.Linear | CompactLinear)}
    parts = read_adapter(resolve_adapter(str(adapter)).path)
    for name, (a, b) in parts.items():
        linear = linears.get(name)
        if linear is None or (linear.out_features, linear.in_features) != (b.shape[0], a.shape[1]):
            found = "it has none" if linear is None else f"its shape is [{linear.out_features}, {linear.in_features}]"
            message = f"the adapter {adapter} has {name} [{b.shape[0]}, {a.shape[1]}], and of the model {found}"
            raise MismatchError(f"{message}: name the adapter's own model with --base")
        if isinstance(linear, CompactLinear):
            linear.add_adapter(a, b)
            continue
        with torch.no_grad():
            linear.weight += (b @ a).to(linear.weight)


def _ends(folder: Path, tokenizer: Any, usual: Any) -> list[int]:
    """The tokens that end a text: the model's own settings, else the tokenizer's, else the architecture's.

    Raises:
        MismatchError: if the model's own settings are damaged.
    """
    from transformers import GenerationConfig

    file, own = folder / "generation_config.json", None
    try:
        own = GenerationConfig.from_pretrained(folder) if file.is_file() else None
    except (ValueError, OSError, TypeError) as error:
        raise MismatchError(f"{file} is damaged: {error}") from None
    for ends in (own and own.eos_token_id, tokenizer.eos_token_id, usual):
        if ends is not None:
            return ends if isinstance(ends, list) else [ends]
    return []
