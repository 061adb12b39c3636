"""Two models side by side: figures on one text, errors module by module and layer by layer, sizes, and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


def weight_errors(first: Any, second: Any) -> dict[str, float]:
    """Module name -> ‖A - B‖² / ‖A‖² of two models' weights, adapters included, float64; of modules of equal shape."""
    import torch

    found = {}
    others = dict(second.named_modules())
    with torch.no_grad():
        for name, module in first.named_modules():
            mine, theirs = _weight(module), _weight(others.get(name))
            if mine is None or theirs is None or mine.shape != theirs.shape:
                continue
            whole = float(mine.square().sum())
            found[name] = float((mine - theirs).square().sum()) / whole if whole else 0.0
    return found


def layer_errors(first: Any, second: Any, tokens: np.ndarray, length: int) -> list[float]:
    """E‖h_A - h_B‖² / E‖h_A‖² of the hidden states behind each decoder layer, over sequences of `length` tokens.

    Empty where the models have other layers.
    """
    import torch

    from a1q.models.blocks import BlockStream

    config, other = first.config, second.config
    if (config.num_hidden_layers, config.hidden_size) != (other.num_hidden_layers, other.hidden_size):
        return []
    length = min(length, len(tokens))
    rows = min(len(tokens), LAYERS) // length
    text = tokens[: rows * length].reshape(rows, length).astype(np.int32)
    streams = [BlockStream(model, text, 4) for model in (first, second)]
    found = []
    for index in range(len(streams[0].names)):
        for stream in streams:
            stream.advance(index)
        wrong = whole = 0.0
        for mine, theirs in zip(streams[0].hidden, streams[1].hidden, strict=True):
            wrong += float((mine.double() - theirs.double()).square().sum())
            whole += float(mine.double().square().sum())
        found.append(wrong / whole if whole else 0.0)
    assert isinstance(streams[0].hidden[0], torch.Tensor)
    return found


def samples(
    prompts: Sequence[str], folder: Any, speakers: Sequence[Speaker], most: int
) -> list[Mapping[str, str | list[str]]]:
    """What both write behind each prompt, the likeliest token each time."""
    from a1q.data.sequences import load_tokenizer

    tokenizer, end = load_tokenizer(folder)
    found: list[Mapping[str, str | list[str]]] = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
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
