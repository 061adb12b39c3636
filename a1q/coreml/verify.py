"""Compare a saved package with the PyTorch model it came from, off a Mac.

The package is read back and interpreted twice over the same tokens, a prompt and the model's own greedy
continuation: `infer` position by position through all of them, and `prefill` over the prompt followed by `infer`.
Every logit vector that comes out is compared with the PyTorch model's, in fp32 and in emulated fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.coreml.interpreter import Interpreter, Precision, State
from a1q.coreml.operations import Array
from a1q.coreml.single import Calls

if TYPE_CHECKING:
    from torch import nn


PASSAGE = (
    "The module reads a text file line by line and returns a list of the words it found. If the file does not "
    "exist, an error is raised that names it. Every word is counted once, and the result is sorted by how often "
    "it occurs, then by name. An optional argument limits how many of them are returned. "
)
"""What the prompt says, repeated as often as it needs."""


@dataclass(frozen=True)
class Reference:
    """What the PyTorch model says."""

    tokens: Array
    """int32 [prompt + generated]."""
    prompt: int
    """How many of them are the prompt; the rest the model chose greedily."""
    logits: Array
    """float32 [positions, vocabulary]."""


@dataclass(frozen=True)
class Comparison:
    """How far one interpretation is from the reference."""

    cosine: float
    """Smallest cosine of a logit vector over all positions and both ways."""
    cosine_mean: float
    max_error: float
    """Largest difference of a logit."""
    kl: float
    """Mean KL divergence in nats, reference to package."""
    greedy_agreement: float
    """Share of the generated tokens that are the package's first choice too; 1 if it would write the same text."""
    overflows: int
    """Numbers that were not finite."""
    overflow_at: str
    """The first operation that had one."""


def prompt_tokens(folder: Path, vocabulary: int, count: int) -> list[int]:
    """`count` tokens of English text in the tokenizer of a model folder; without one, of a fixed random sequence."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PASSAGE, add_special_tokens=False).ids
        if tokens and max(tokens) < vocabulary:
            return (tokens * -(-count // len(tokens)))[:count]
    return np.random.default_rng(0).integers(0, vocabulary, count).tolist()


def reference_run(model: nn.Module, prompt: Sequence[int], generate: int) -> Reference:
    """Let the PyTorch model continue `prompt` greedily by `generate` tokens, in float32."""
    import torch

    model = model.eval().float()
    with torch.inference_mode():
        tokens = torch.tensor([list(prompt)])
        for _ in range(generate):
            choice = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, choice], dim=1)
        logits = model(tokens, use_cache=False).logits[0].float().numpy()
    return Reference(tokens[0].numpy().astype(np.int32), len(prompt), logits)


def compare(
    program: Any,
    layout: Calls,
    reference: Reference,
    precision: Precision,
    tick: Callable[[], None] = lambda: None,
) -> Comparison:
    """Interpret `program` over the reference's tokens and compare.

    Args:
        tick: called after every call of a function.
    """
    interpreter = Interpreter(program, precision)
    tokens, prompt = reference.tokens, reference.prompt
    stepped = {}
    state = interpreter.new_state()
    for position in range(len(tokens)):
        stepped[position] = _infer(interpreter, layout, tokens, position, state)
        tick()
    filled = {}
    state = interpreter.new_state()
    for start in range(0, prompt, layout.chunk):
        stop = min(start + layout.chunk, prompt)
        filled[stop - 1] = _prefill(interpreter, layout, tokens[start:stop], start, state)
        tick()
    for position in range(prompt, len(tokens)):
        filled[position] = _infer(interpreter, layout, tokens, position, state)
        tick()

    places = np.array([*stepped, *filled])
    found = np.stack([*stepped.values(), *filled.values()]).astype(np.float64)
    expected = reference.logits[places].astype(np.float64)
    cosine = _cosine(expected, found)
    choosing = range(prompt - 1, len(tokens) - 1)
    agreement = [filled[place].argmax() == tokens[place + 1] for place in choosing]
    return Comparison(
        cosine=float(cosine.min()),
        cosine_mean=float(cosine.mean()),
        max_error=float(np.abs(expected - found).max()),
        kl=float(_kl(expected, found).mean()),
        greedy_agreement=float(np.mean(agreement)) if agreement else 1.0,
        overflows=sum(interpreter.overflows.values()),
        overflow_at=next(iter(interpreter.overflows), ""),
    )


def _infer(interpreter: Interpreter, layout: Calls, tokens: Array, position: int, state: State) -> Array:
    inputs = {"input_ids": tokens[None, position : position + 1], "position": np.array([position], np.int32)}
    return _logits(interpreter.run("infer", inputs, state), layout)


def _prefill(interpreter: Interpreter, layout: Calls, tokens: Array, start: int, state: State) -> Array:
    """One chunk, padded with token 0; the logits after its last token."""
    padded = np.zeros((1, layout.chunk), np.int32)
    padded[0, : len(tokens)] = tokens
    inputs = {"input_ids": padded, "position": np.array([start], np.int32), "last": np.array([len(tokens) - 1])}
    return _logits(interpreter.run("prefill", inputs, state), layout)


def _logits(outputs: dict[str, Array], layout: Calls) -> Array:
    return np.concatenate([outputs[name][0, 0] for name in layout.outputs])


def _cosine(expected: Array, found: Array) -> Array:
    """Cosine per row; 0 where numbers are not finite."""
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num((expected * found).sum(axis=1) / norms, nan=0.0, posinf=0.0, neginf=0.0)


def _kl(expected: Array, found: Array) -> Array:
    """KL divergence per row in nats, of the softmax of `found` from that of `expected`."""
    p, q = _log_softmax(expected), _log_softmax(found)
    return (np.exp(p) * (p - q)).sum(axis=1)


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
