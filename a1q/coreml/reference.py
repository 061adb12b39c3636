"""What a package is compared with: the PyTorch model's logits over some tokens, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.errors import MismatchError, StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from a1q.coreml.operations import Array

PASSAGE = (
    "The module reads a text file line by line and returns a list of the words it found. If the file does not "
    "exist, an error is raised that names it. Every word is counted once, and the result is sorted by how often "
    "it occurs, then by name. An optional argument limits how many of them are returned. "
)
"""What the prompt says, repeated as often as it needs."""
PREFILLED = 5 / 8
"""Share of random tokens that go through prefill before the rest goes step by step."""


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
    """The same with dense weights rounded to fp16, which is all that a package can hold: what is left between this and
    the package in fp32 is not the weights' precision. `logits` itself where rounding changes nothing."""


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


def sequences(folder: Path, vocabulary: int, prompt: int, generate: int, random: int) -> list[Tokens]:
    """What verification runs over: text and its continuation, and random tokens that meet more of the vocabulary.

    Args:
        folder: where the tokenizer is.
    """
    found = []
    if prompt:
        found.append(Tokens(tuple(prompt_tokens(folder, vocabulary, prompt)), generate=generate))
    if random:
        tokens = random_tokens(vocabulary, random)
        filled = max(1, int(PREFILLED * random))
        found.append(Tokens(tuple(tokens[:filled]), tuple(tokens[filled:])))
    return found


def references(model: nn.Module, wanted: Sequence[Tokens]) -> list[Reference]:
    """Let a PyTorch model on the CPU say what it says, in float32.

    The model is used up: quantized modules are written out dense, and dense weights rounded.
    """
    import torch

    from a1q.models.dense import write_out

    model = model.eval().float()
    dense = _dense_parameters(model)
    write_out(model)
    with torch.inference_mode():
        ids = [_continued(model, tokens) for tokens in wanted]
        logits = [_logits(model, each) for each in ids]
    rounded = logits
    with torch.no_grad():
        if _round(dense, norm_offset=_norm_offset(model)):
            rounded = [_logits(model, each) for each in ids]
    return [
        Reference(each[0].numpy().astype(np.int32), len(tokens.prompt), tokens.generate, saved, exact)
        for each, tokens, saved, exact in zip(ids, wanted, logits, rounded, strict=True)
    ]


def folder_references(
    folder: Path,
    wanted: Sequence[Tokens],
    adapters: bool = True,
    repalettized: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Reference]:
    """As `references`, of the model in a folder, which is let go again: only logits stay.

    Args:
        adapters: whether unmerged adapters are added.
        repalettized: rules by which modules were fitted anew for the package (`a1q.coreml.repalettize`).

    Raises:
        MismatchError: if the folder holds no model that can be loaded.
    """
    from a1q.coreml.repalettize import replace_modules
    from a1q.models.checkpoint import load_model
    from a1q.models.view import read_view
    from a1q.quant.linear import quantized_modules

    try:
        model = load_model(folder)
    except StageError as error:
        raise MismatchError(str(error)) from None
    if repalettized:
        replace_modules(model, repalettized, read_view(folder))
    if not adapters:
        for _, module in quantized_modules(model):
            module.drop_adapter()
    return references(model, wanted)


def _dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are weights by themselves, not parts of a scheme."""
    from a1q.quant.linear import quantized_modules

    parts = {id(p) for _, module in quantized_modules(model) for p in module.parameters() if p is not module.bias}
    return [parameter for parameter in model.parameters() if id(parameter) not in parts]


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
