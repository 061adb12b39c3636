"""What a package is compared with: the PyTorch model's logits over some tokens, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.errors import MismatchError, Problem, StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from a1q.coreml.architecture import Architecture
    from a1q.coreml.operations import Array

PASSAGE = (
    "The module reads a text file line by line and returns a list of the words it found. If the file does not "
    "exist, an error is raised that names it. Every word is counted once, and the result is sorted by how often "
    "it occurs, then by name. An optional argument limits how many of them are returned. "
)
"""What the prompt says, repeated as often as it needs."""
PREFILLED = 5 / 8
"""Share of random tokens that go through prefill before the rest goes step by step."""


STEPS_BEYOND = 8
"""Tokens behind a sliding window that go step by step."""
STEPPED = 256
"""Longer texts are not run step by step from their start: prefill and a few steps must do."""


@dataclass(frozen=True)
class Tokens:
    """What to run a model over."""

    prompt: tuple[int, ...]
    """Goes through prefill."""
    forced: tuple[int, ...] = ()
    """Follows it token by token."""
    generate: int = 0
    """Tokens that the model then writes, the likeliest each time."""


@dataclass(frozen=True)
class Reference:
    """What the PyTorch model says."""

    tokens: Array
    """int32 [n]: prompt, forced and written ones."""
    prompt: int
    """How many are the prompt."""
    written: int
    """How many of the last the model chose itself."""
    logits: Array
    """float32 [n, vocabulary]: with its weights as they are."""
    rounded: Array
    """The same with weights rounded to fp16 that a package holds dense, or that Core ML makes dense of integers in
    blocks: what is left between this and the package in fp32 is not the weights' precision. `logits` itself where
    rounding changes nothing."""

    @property
    def stepped(self) -> bool:
        """Whether it is also run token by token from its start."""
        return len(self.tokens) <= STEPPED


def prompt_tokens(folder: Path, vocabulary: int, count: int) -> list[int]:
    """`count` tokens of English text in the tokenizer of a folder, begun as that begins a text; without one, of a fixed
    random sequence."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
        repeats = 1 + count // max(1, len(encode(PASSAGE, add_special_tokens=False).ids))
        tokens: list[int] = encode(PASSAGE * repeats).ids
        if len(tokens) >= count and max(tokens) < vocabulary:
            return tokens[:count]
    return random_tokens(vocabulary, count)


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """`count` tokens drawn evenly."""
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def beyond_window(architecture: Architecture, prefill: int, context: int) -> int:
    """Tokens that reach beyond a sliding window, where there is one inside the context; else 0."""
    if not 0 < architecture.window < context:
        return 0
    return min(context, architecture.window + prefill + STEPS_BEYOND)


def sequences(folder: Path, vocabulary: int, prompt: int, generate: int, random: int, beyond: int = 0) -> list[Tokens]:
    """What verification runs over: text and its continuation, and random tokens that meet more of the vocabulary.

    Args:
        folder: where the tokenizer is.
        beyond: where it is not 0 and random tokens are wanted, tokens of one more random text, see `beyond_window`.
    """
    found = []
    if prompt:
        found.append(Tokens(tuple(prompt_tokens(folder, vocabulary, prompt)), generate=generate))
    if random:
        tokens = random_tokens(vocabulary, random)
        filled = max(1, int(PREFILLED * random))
        found.append(Tokens(tuple(tokens[:filled]), tuple(tokens[filled:])))
    if random and beyond:
        tokens = random_tokens(vocabulary, beyond, seed=1)
        found.append(Tokens(tuple(tokens[:-STEPS_BEYOND]), tuple(tokens[-STEPS_BEYOND:])))
    return found


def references(model: nn.Module, wanted: Sequence[Tokens]) -> list[Reference]:
    """Let a PyTorch model on the CPU say what it says, in float32.

    The model is used up: quantized modules are written out dense, and dense weights rounded.
    """
    import torch

    from a1q.models.dense import write_out

    model = model.eval().float()
    dense, decoded = _dense_parameters(model), _decoded_modules(model)
    write_out(model)
    with torch.inference_mode():
        ids = [_continued(model, tokens) for tokens in wanted]
        logits = [_logits(model, each) for each in ids]
    rounded = logits
    with torch.no_grad():
        changed = _round(dense, norm_offset=_norm_offset(model))
        _round_decoded(model, decoded)
        if changed or decoded:
            rounded = [_logits(model, each) for each in ids]
    return [
        Reference(each[0].numpy().astype(np.int32), len(tokens.prompt), tokens.generate, saved, exact)
        for each, tokens, saved, exact in zip(ids, wanted, logits, rounded, strict=True)
    ]


def load_for_package(
    folder: Path, adapters: bool = True, repalettized: Mapping[str, Mapping[str, Any]] | None = None
) -> Any:
    """The model of a folder as a package was made of it.

    Args:
        adapters: whether unmerged adapters stay.
        repalettized: rules by which modules were fitted anew for the package (`a1q.coreml.repalettize`).

    Raises:
        MismatchError: if the folder holds no model that can be loaded, or one that the rules don't fit.
    """
    from a1q.coreml.repalettize import problems, replace_modules
    from a1q.models.checkpoint import load_model
    from a1q.models.view import read_view
    from a1q.quant.linear import quantized_modules

    try:
        model = load_model(folder)
    except StageError as error:
        raise MismatchError(str(error)) from None
    if repalettized:
        view = read_view(folder)
        if found := problems(repalettized, view):
            raise MismatchError([Problem(f"{folder} is not what the package was made of: {text}") for text in found])
        replace_modules(model, repalettized, view)
    if not adapters:
        for _, module in quantized_modules(model):
            module.drop_adapter()
    return model


def _dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are weights by themselves, not parts of a scheme."""
    from a1q.quant.linear import quantized_modules

    parts = {id(p) for _, module in quantized_modules(model) for p in module.parameters() if p is not module.bias}
    return [parameter for parameter in model.parameters() if id(parameter) not in parts]


def _decoded_modules(model: nn.Module) -> dict[str, Any]:
    """Modules whose weight Core ML decodes to a dense one in fp16, and heads tied to one, by name."""
    from a1q.quant.module import QuantModule
    from a1q.quant.tied import TiedHead

    found = {}
    for name, module in model.named_modules():
        source = module.source if isinstance(module, TiedHead) else module
        if isinstance(source, QuantModule) and source.scheme.hardware == "blockwise":
            found[name] = source
    return found


def _round_decoded(model: nn.Module, modules: Mapping[str, Any]) -> None:
    """Round the weights of `_decoded_modules` to fp16 where they stand now that `write_out` was there."""
    from torch import nn

    for name, source in modules.items():
        module = model.get_submodule(name)
        if module is source:  # an embedding, which still makes its rows when they are looked up
            module.register_forward_hook(_round_rows)
            continue
        assert isinstance(module, nn.Linear)
        weight = source.dequantize().half().float()
        module.weight.copy_(weight if source.adapter is None else weight + source.adapter_delta())


def _round_rows(embedding: Any, _args: Any, rows: Tensor) -> Tensor:
    """Rows of a quantized embedding, rounded to fp16 before the factor that Gemma gives them."""
    scale = 1.0 if embedding.embed_scale is None else embedding.embed_scale.to(rows.dtype)
    return (rows / scale).half().to(rows.dtype) * scale


def _norm_offset(model: nn.Module) -> float:
    """What this family adds to the stored gains of its norms, before a package rounds them."""
    from a1q.coreml.architecture import FAMILIES

    family = FAMILIES.get(model.config.model_type)  # type: ignore[union-attr, arg-type]
    return 1.0 if family is not None and family.gemma else 0.0


def _round(parameters: Sequence[nn.Parameter], norm_offset: float) -> bool:
    """Round in place to fp16; whether anything changed. Vectors are gains of norms or biases."""
    import torch

    changed = False
    for parameter in parameters:
        offset = norm_offset if parameter.ndim == 1 else 0.0
        rounded = (parameter + offset).half().float() - offset
        changed = changed or not torch.equal(rounded, parameter)
        parameter.copy_(rounded)
    return changed


def _continued(model: nn.Module, tokens: Tokens) -> Tensor:
    """Ids [1, n]: prompt, forced tokens and the model's own continuation, the likeliest token each time."""
    import torch

    ids = torch.tensor([[*tokens.prompt, *tokens.forced]])
    cache, fed = None, ids
    for _ in range(tokens.generate):
        output = model(fed, past_key_values=cache, use_cache=True)
        cache, fed = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, fed], dim=1)
    return ids


def _logits(model: nn.Module, ids: Tensor) -> Array:
    """float32 [n, vocabulary]."""
    found: Array = model(ids, use_cache=False).logits[0].float().numpy()
    return found
