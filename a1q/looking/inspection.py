"""All that `a1q inspect` says of a folder, as JSON has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from a1q.engine.files import tree_size
from a1q.errors import MismatchError, StageError
from a1q.looking.dense import dense_numbers
from a1q.looking.numbers import Numbers, numbers_of, together
from a1q.looking.target import Target, read_object, require_whole
from a1q.looking.tensors import bytes_by_kind
from a1q.models.view import DENSE, ModelView, ModuleView, read_view
from a1q.quant.bits import bpw, bpw_model, module_bits


def inspect(target: Target, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Look at a target.

    Args:
        wanted: which quantized modules of a model are looked at one by one.

    Raises:
        MismatchError: if it is damaged; the message names the file.
    """
    require_whole(target)
    look = {"model": _model, "package": _package, "teacher": _teacher, "statistics": _statistics}
    facts: dict[str, Any] = {
        "kind": target.kind,
        "folder": str(target.folder),
        "bytes": tree_size(target.folder),
    }
    if target.kind == "model":
        return facts | _model(target.folder, wanted)
    if target.kind in look:
        return facts | look[target.kind](target.folder)  # type: ignore[operator]
    names = {"rules": "rules.json", "report": "report.json"}
    if target.kind in names:
        return facts | {"content": read_object(target.folder / names[target.kind])}
    return facts | _adapter(target.folder)


def _model(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    from a1q.models.checkpoint import load_model
    from a1q.quant.module import quantized_modules

    try:
        view = read_view(folder)
        found: dict[str, Numbers] = {}
        if any(module.state != DENSE for module in view.modules.values()):
            for name, module in quantized_modules(load_model(folder)):
                if wanted(name):
                    found[name] = numbers_of(module)
        dense = dense_numbers(folder, view)
    except StageError as error:
        raise MismatchError(str(error)) from None
    rules = []
    for rule in _by_rule(view):
        own = {name: found[name] for name in rule["modules"] if name in found}
        rules.append({**rule, "numbers": together(own) if own else None})
    return {
        "model_type": view.config.get("model_type"),
        "layers": view.config.get("num_hidden_layers"),
        "hidden": view.config.get("hidden_size"),
        "vocabulary": view.config.get("vocab_size"),
        "context": view.config.get("max_position_embeddings"),
        "tied": view.tied,
        "parameters": view.parameters,
        "bpw": bpw(view),
        "bpw_model": bpw_model(view),
        "bytes_by_kind": bytes_by_kind(folder, view),
        "dense": {kind: dataclasses.asdict(numbers) for kind, numbers in dense.items()},
        "rules": rules,
        "modules": {
            name: {**_facts(view.modules[name]), "numbers": dataclasses.asdict(numbers)}
            for name, numbers in found.items()
        },
    }


def _by_rule(view: ModelView) -> list[dict[str, Any]]:
    """Modules that are stored alike, together."""
    groups: dict[str, list[ModuleView]] = {}
    for module in view.modules.values():
        facts = {**_facts(module)}
        facts.pop("shape"), facts.pop("bits_per_weight")
        groups.setdefault(repr(facts), []).append(module)
    found = []
    for modules in groups.values():
        facts = _facts(modules[0])
        weights = sum(module.shape[0] * module.shape[1] for module in modules)
        facts.pop("shape")
        facts["bits_per_weight"] = sum(map(module_bits, modules)) / weights
        found.append({"modules": [module.name for module in modules], "weights": weights, **facts})
    return found


def _facts(module: ModuleView) -> dict[str, Any]:
    return {
        "state": module.state,
        "kind": module.kind,
        "scheme": dict(module.scheme) if module.scheme else None,
        "shape": list(module.shape),
        "bits_per_weight": module_bits(module) / (module.shape[0] * module.shape[1]),
        "adapter": module.adapter,
        "latent": module.latent,
    }


def _package(folder: Path) -> dict[str, Any]:
    from a1q.coreml.accounting import account_bundle
    from a1q.coreml.bundle import read_bundle

    bundle = read_bundle(folder)
    costs = account_bundle(bundle, int(bundle.meta.get("parameters") or 0))
    return {
        "layout": bundle.meta["layout"],
        "context": bundle.context,
        "vocabulary": bundle.vocabulary,
        "bytes_per_token": costs.bytes_per_token,
        "cache_bytes": costs.cache_bytes,
        "parts": {
            name: {
                "bytes": part.bytes_on_disk,
                "bytes_by_kind": part.bytes_by_kind,
                "bits_per_weight": part.bits_per_weight,
                "functions": {label: function.positions for label, function in part.functions.items()},
            }
            for name, part in costs.parts.items()
        },
    }


def _teacher(folder: Path) -> dict[str, Any]:
    from a1q.distill.cache import TeacherCache

    try:
        cache = TeacherCache(folder)
    except StageError as error:
        raise MismatchError(str(error)) from None
    meta = cache.meta
    names = ("vocabulary", "seq_len", "top_k", "random_negatives", "temperatures", "separate", "prompts", "data")
    return {
        **{name: meta.get(name) for name in names},
        "sequences": {part: cache.size(part) for part in ("train", "tune")},
        "assistant_tokens": meta.get("said"),
        "tokenizer": meta.get("tokenizer"),
        "chat_template": meta.get("chat_template"),
    }


def _statistics(folder: Path) -> dict[str, Any]:
    from a1q.quant.statistics import Statistics

    try:
        found = Statistics(folder)
        tokens = found.tokens
    except StageError as error:
        raise MismatchError(str(error)) from None
    layers = sorted({name.rpartition(".")[0].rpartition(".")[0] for name in found.square} - {""})
    return {
        "modules": len(found.square),
        "sequences": len(tokens),
        "tokens": int(tokens.size),
        "documents_apart": found.borders is not None,
        "gradients": any(found.sensitivity(layer) is not None for layer in layers[:1]),
        "largest": {name: float(square.max()) ** 0.5 for name, square in found.square.items()},
    }


def _adapter(folder: Path) -> dict[str, Any]:
    from a1q.models.adapter_source import read_adapter_view

    modules = read_adapter_view(folder)
    return {
        "base": read_object(folder / "adapter_config.json").get("base_model_name_or_path"),
        "modules": {
            name: {"rank": item.rank, "shape": list(item.shape), "scale": item.scale} for name, item in modules.items()
        },
    }
