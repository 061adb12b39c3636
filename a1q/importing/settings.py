"""What a checkpoint's config says of its training: checked against the tensors, and read where they can't tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from a1q.engine.matching import summarize
from a1q.errors import MismatchError, Problem
from a1q.importing.checkpoint import KINDS, Checkpoint, Stored

ATTENTION = re.compile(r".*\.self_attn\.[qkvo]_proj")
ACTIVATIONS = ("identity", "abs", "softplus")
METHODS = ("abs", "softplus")
SNAPPED = ("lut", "baked")
REMEDY = "where the config is of another run, name the right one (--config FILE) or move it away"


@dataclass(frozen=True)
class Settings:
    """What tensors alone don't say, as their programs set it where no config does."""

    snapped: str | None = None
    """V1: `lut` where `weight` holds entries of the table, `baked` where it holds them times the scale, or empty where
    it trains; None where nothing says."""
    include_zero: bool | None = None
    """V1: whether the table was made with a zero; None where nothing says."""
    force_positive: bool = False
    """V2: factors count by `positive_method`."""
    positive_method: str = "abs"
    magnitude_activation: str = "identity"
    """V2: what makes g of `rank_magnitude`."""
    magnitude_eps: float = 1e-6
    """V2: is added to it."""
    norm_eps: float = 1e-6
    """V2: least norm that directions are divided by."""
    group_size: int | None = None
    alpha: float | None = None
    """Of LoRA; None where nothing says."""
    model_id: str | None = None
    """What was trained."""


def read_settings(checkpoint: Checkpoint) -> Settings:
    """The settings, once everything else the config says was found to agree with the tensors.

    Raises:
        MismatchError: if a value and the tensors contradict each other, both named, or a value is none that there is.
    """
    config = _flat(checkpoint.config)
    problems = [
        Problem(f"{checkpoint.config_from}: {text}", hint=REMEDY)
        for text in (*_contradictions(config, checkpoint.modules.values()), *_unknown(config))
    ]
    if problems:
        raise MismatchError(problems)
    default = Settings()
    alpha, model = config.get("lora_alpha"), config.get("model_id") or config.get("model_name_or_path")
    return Settings(
        snapped=_snapped(config),
        include_zero=bool(config["lut_include_zero"]) if "lut_include_zero" in config else None,
        force_positive=bool(config.get("force_positive_scales", default.force_positive)),
        positive_method=config.get("positive_scale_method", default.positive_method),
        magnitude_activation=config.get("magnitude_activation", default.magnitude_activation),
        magnitude_eps=float(config.get("magnitude_eps", default.magnitude_eps)),
        norm_eps=float(config.get("norm_eps", default.norm_eps)),
        group_size=_whole(config.get("group_size")),
        alpha=float(alpha) if _is_number(alpha) and alpha > 0 else None,
        model_id=model if isinstance(model, str) else None,
    )


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """One level: `quant_config.json` has the values of MLPs and attention in mappings of their own."""
    flat = {key: value for key, value in config.items() if key not in ("mlp", "attn")}
    mlp, attention = config.get("mlp"), config.get("attn")
    if isinstance(mlp, Mapping):
        flat |= mlp
        flat["quantize_attn"] = attention is not None
    if isinstance(attention, Mapping):
        flat |= {f"attn_{key}": value for key, value in attention.items()}
    return flat


def _snapped(config: Mapping[str, Any]) -> str | None:
    if config.get("snapped_mode"):
        return str(config["snapped_mode"])
    if "snapped" not in config:
        return None
    return ("baked" if config.get("snap_bake_scales") else "lut") if config["snapped"] else ""


# -- what contradicts --------------------------------------------------------------------------------------------
def _contradictions(config: Mapping[str, Any], modules: Iterable[Stored]) -> list[str]:
    """What the config says and the tensors say otherwise, each as a sentence."""
    stored = [module for module in modules if module.kind != "adapter"]
    attention = [module for module in stored if ATTENTION.fullmatch(module.name)]
    others = [module for module in stored if not ATTENTION.fullmatch(module.name)]
    found: list[str] = []
    for key, fact in _FACTS.items():
        own, mlp, given = (_whole(config.get(name)) for name in (f"attn_{key}", f"mlp_{key}", key))
        keys = {f"attn_{key}": (own, attention), f"mlp_{key}": (mlp, others), key: (given, others)}
        if own is None and f"attn_{key}" not in config:
            keys[key] = (given, stored if mlp is None else attention)
        for name, (value, concerned) in keys.items():
            if value is not None and value > 0:  # 0 and -1 mean: as the MLPs, or none
                found += _odd(name, value, fact, concerned)
    version = config.get("version")
    odd = [module for module in stored if version in ("v1", "v2") and module.kind not in (version, "balanced")]
    if odd:
        found.append(f"version is {version!r}, and {_names(odd)} are {KINDS[odd[0].kind]}")
    if isinstance(config.get("quantize_attn"), bool) and stored and config["quantize_attn"] != bool(attention):
        many = f"{len(attention)} modules of attention are quantized" if attention else "no module of attention is"
        found.append(f"quantize_attn is {str(config['quantize_attn']).lower()}, and {many}")
    return found + _ranks(config, modules)


def _ranks(config: Mapping[str, Any], modules: Iterable[Stored]) -> list[str]:
    rank = config.get("lora_r", config.get("recovery_r"))
    if not _is_number(rank):
        return []
    having = {module.name: len(module.parts["lora_A"]) for module in modules if "lora_A" in module.parts}
    if odd := {name: found for name, found in having.items() if found != rank}:
        name = next(iter(odd))
        return [f"lora_r is {rank}, and {name} has an adapter of rank {odd[name]}"]
    return [] if having or not rank else [f"lora_r is {rank}, and there is no adapter"]


def _odd(key: str, said: int, fact: Any, modules: Sequence[Stored]) -> list[str]:
    """What modules are instead of what `key` says, a sentence for each way."""
    odd: dict[str, list[str]] = {}
    for module in modules:
        if (found := fact(said, module)) is not None:
            odd.setdefault(found, []).append(module.name)
    return [f"{key} is {said}, and {', '.join(summarize(names, 4))} {found}" for found, names in odd.items()]


def _tables(said: int, module: Stored) -> str | None:
    entries = _entries(module)
    return None if entries in (None, said) else f"have tables of {entries} entries"


def _bits(said: int, module: Stored) -> str | None:
    entries = _entries(module)
    return None if entries in (None, 2**said) else f"have {math.log2(entries or 1):g} bits"


def _entries(module: Stored) -> int | None:
    if module.kind == "balanced":
        return int(2 ** int(module.parts["_qat_nbits"].item()))
    return module.parts["lut"].numel()


def _scale_rank(said: int, module: Stored) -> str | None:
    if module.kind == "balanced":
        return None
    a, b = module.parts["scale_A"], module.parts["scale_B"]
    rank = a.shape[-1]
    return None if rank == min(said, a.shape[0], b.shape[-1]) else f"have scales of rank {rank}"


def _group(said: int, module: Stored) -> str | None:
    if module.kind != "v1":
        return None
    padded, size = module.parts["scale_B"].shape[-1], module.parts["weight"].shape[-1]
    return None if padded == -(-size // said) * said else f"have scales of {padded} columns for {size} inputs"


_FACTS = {
    "lut_size": _tables,
    "lut_bits": _bits,
    "quant_bits": _bits,
    "scale_rank": _scale_rank,
    "group_size": _group,
}
"""Entry of a config -> what a module has instead of the value that it says, None where it has that."""


# -- values ------------------------------------------------------------------------------------------------------
def _unknown(config: Mapping[str, Any]) -> list[str]:
    """Values that are none there is."""
    found = [
        f"{name} is {config[name]!r}, expected a whole number"
        for key in _FACTS
        for name in (key, f"attn_{key}", f"mlp_{key}")
        if config.get(name) is not None and _whole(config[name]) is None
    ]
    choices = {"positive_scale_method": METHODS, "magnitude_activation": ACTIVATIONS, "snapped_mode": SNAPPED}
    for name, known in choices.items():
        if config.get(name) is not None and config[name] not in known:
            found.append(f"{name} is {config[name]!r}, expected one of {', '.join(known)}")
    for name in ("magnitude_eps", "norm_eps"):
        value = config.get(name)
        if name in config and not (_is_number(value) and math.isfinite(value) and value >= 0):
            found.append(f"{name} is {value!r}, expected a number of at least 0")
    return found


def _whole(value: Any) -> int | None:
    return int(value) if _is_number(value) and float(value).is_integer() else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(modules: Sequence[Stored]) -> str:
    return ", ".join(summarize((module.name for module in modules), 4))
