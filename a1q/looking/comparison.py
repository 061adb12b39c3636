"""Two models side by side: figures on one text, errors module by module and layer by layer, sizes, and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a1q.errors import UsageError
from a1q.looking.sources import Speaker, sample
from a1q.looking.target import Target
from a1q.looking.tensors import bytes_by_kind
from a1q.looking.windows import measure
from a1q.models.view import read_view
from a1q.quant.bits import bpw, bpw_model

PROMPTS = ("The function returns", "If the file does not exist,", "For example:")
LAYERS = 4096
"""Tokens whose hidden states are compared."""


def sizes(target: Target) -> dict[str, Any]:
    """Bits and bytes of a model or package."""
    from a1q.engine.files import tree_size

    found: dict[str, Any] = {"folder": str(target.folder), "kind": target.kind, "bytes": tree_size(target.folder)}
    if target.kind == "model":
        view = read_view(target.folder)
        found |= {"bpw": bpw(view), "bpw_model": bpw_model(view), "bytes_by_kind": bytes_by_kind(target.folder, view)}
    return found


def figures(tokens: np.ndarray, first: Speaker, second: Speaker, window: int) -> dict[str, float]:
    """`measure` of the second against the first: `ppl` is the second's, `reference_ppl` the first's."""
    return measure(tokens, second.logits, first.logits, window, max(window // 2, 1))


def weight_errors(first: Any, second: Any) -> dict[str, float | None]:
    """Module name -> ‖A - B‖² / ‖A‖² of two models' weights, adapters included, float64; of modules of equal shape.

    None where that is not finite.
    """
    import torch

    found: dict[str, float | None] = {}
    others = dict(second.named_modules())
    with torch.no_grad():
        for name, module in first.named_modules():
            mine, theirs = _weight(module), _weight(others.get(name))
            if mine is None or theirs is None or mine.shape != theirs.shape:
                continue
            found[name] = _share(float((mine - theirs).square().sum()), float(mine.square().sum()))
    return found


def layer_errors(first: Any, second: Any, tokens: np.ndarray, length: int) -> list[float | None]:
    """E‖h_A - h_B‖² / E‖h_A‖² of the hidden states behind each decoder layer, over sequences of `length` tokens.

    None where that is not finite; empty where the models have other layers.
    """
    from a1q.models.blocks import BlockStream

    config, other = first.config, second.config
    if (config.num_hidden_layers, config.hidden_size) != (other.num_hidden_layers, other.hidden_size):
        return []
    length = min(length, len(tokens))
    rows = min(len(tokens), LAYERS) // length
    text = tokens[: rows * length].reshape(rows, length).astype(np.int32)
    streams = [BlockStream(model, text, 4) for model in (first, second)]
    found: list[float | None] = []
    for index in range(len(streams[0].names)):
        for stream in streams:
            stream.advance(index)
        wrong = whole = 0.0
        for mine, theirs in zip(streams[0].hidden, streams[1].hidden, strict=True):
            wrong += float((mine.double() - theirs.double()).square().sum())
            whole += float(mine.double().square().sum())
        found.append(_share(wrong, whole))
    return found


def _share(wrong: float, whole: float) -> float | None:
    found = wrong / whole if whole else 0.0
    return found if math.isfinite(found) else None


def read_prompts(prompts: Sequence[str], folder: Path, context: int) -> dict[str, list[int]]:
    """Prompt -> its tokens by the tokenizer in `folder`.

    Raises:
        UsageError: if one has none, or leaves no place in a context of so many tokens.
    """
    from a1q.data.sequences import load_tokenizer

    tokenizer, _ = load_tokenizer(folder)
    found = {prompt: tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts}
    for prompt, ids in found.items():
        if not 0 < len(ids) < context:
            raise UsageError(f"--prompt {prompt[:40]!r} has {len(ids)} tokens; expected 1 to {context - 1}")
    return found


def samples(
    prompts: Mapping[str, list[int]], folder: Path, speakers: Sequence[Speaker], most: int
) -> list[Mapping[str, str | list[str]]]:
    """What both write behind each prompt of `read_prompts`, the likeliest token each time."""
    from a1q.data.sequences import load_tokenizer

    tokenizer, end = load_tokenizer(folder)
    found: list[Mapping[str, str | list[str]]] = []
    for prompt, ids in prompts.items():
        written = [tokenizer.decode(sample(speaker, ids, most, [end])) for speaker in speakers]
        found.append({"prompt": prompt, "written": written})
    return found


def _weight(module: Any) -> Any:
    """The weight [out, in] that a module multiplies with, float64, or None if it has none."""
    from torch import nn

    from a1q.quant.module import QuantModule

    if isinstance(module, QuantModule):
        return module.dequantize().double() + module.adapter_delta().double()
    if isinstance(module, nn.Linear | nn.Embedding):
        return module.weight.detach().double()
    return None
