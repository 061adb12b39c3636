"""What is looked at with text: the text as tokens, and models and packages as functions of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from a1q.errors import MismatchError, StageError, UsageError
from a1q.generation.loading import find_device
from a1q.looking.target import Target, require_predicting, require_whole

if TYPE_CHECKING:
    from a1q.looking.windows import Logits

PROSE = "builtin:prose"


@dataclass(frozen=True)
class Speaker:
    """What gives logits for a whole text."""

    logits: Logits
    context: int
    vocabulary: int
    model: Any = None
    """The module of torch; None for packages."""


def open_speaker(target: Target, device: str, precision: Literal["fp32", "fp16"] = "fp16") -> Speaker:
    """Load a model or package.

    Raises:
        MismatchError: if it can't be loaded.
        MismatchError: if it is damaged.
        UsageError: if a package is asked to run on another device.
    """
    require_whole(target)
    if target.kind == "package":
        return _package(target.folder, device, precision)
    import torch

    from a1q.models.checkpoint import load_model
    from a1q.models.positions import passed

    place = find_device(device)
    try:
        model = load_model(target.folder, device=place)
    except StageError as error:
        raise MismatchError(str(error)) from None

    def logits(ids: np.ndarray) -> Any:
        with torch.inference_mode():
            return model(**passed(torch.from_numpy(ids.astype(np.int64))[None].to(place))).logits[0]

    return Speaker(logits, model.config.max_position_embeddings, model.config.vocab_size, model)


def _package(folder: Path, device: str, precision: Literal["fp32", "fp16"]) -> Speaker:
    from a1q.coreml.bundle import read_bundle
    from a1q.coreml.device import CoreMLBackend, available
    from a1q.coreml.runner import InterpreterBackend, make_runner

    if device != "auto":
        raise UsageError(f"--device {device} is for models; {folder} is a Core ML package")
    bundle = read_bundle(folder)
    backend = CoreMLBackend(bundle) if available() is None else InterpreterBackend(bundle, precision)
    runner = make_runner(bundle, backend)

    def logits(ids: np.ndarray) -> Any:
        rows = [runner.prefill(ids[:1].tolist()), *(runner.step(int(token)) for token in ids[1:])]
        return np.stack(rows)

    return Speaker(logits, bundle.context, bundle.vocabulary)


def text_tokens(source: str, folder: Path, count: int | None) -> np.ndarray:
    """The first `count` tokens, int64 [n], of a text by the tokenizer in `folder`, its end-of-text between documents.

    Args:
        source: as a recipe's data entry has it; of built-in text the test side, of anything else all there is.
        count: None for all.

    Raises:
        MismatchError: if there is no such text, or no tokenizer.
        StageError: if it can't be read or holds no text.
    """
    from a1q.data import documents
    from a1q.data.records import prepare, records
    from a1q.data.sequences import load_tokenizer

    tokenizer, end = load_tokenizer(folder)
    entry = {"source": source}
    prepare(entry)
    if source.startswith("builtin:"):
        texts = documents(entry, "test")
    else:
        texts = (
            record.text or "\n\n".join(message["content"] for message in record.messages) for record in records(entry)
        )
    found: list[int] = []
    for text in texts:
        found += [*([end] if found else []), *tokenizer.encode(text, add_special_tokens=False).ids]
        if count is not None and len(found) >= count:
            break
    if not found:
        raise StageError(f"{source} holds no text")
    return np.array(found[:count], dtype=np.int64)


def require_same_text(target: Target, other: Target, first: str, second: str) -> None:
    """Refuse two whose tokenizers disagree.

    Raises:
        UsageError: if one predicts nothing.
        MismatchError: it names tokens that differ.
    """
    require_predicting(target, first)
    require_predicting(other, second)
    from a1q.distill.tokenizers import require_same_tokens

    try:
        require_same_tokens(target.folder, other.folder, "")
    except MismatchError as error:
        reason = str(error).strip().partition("\n")[0]
        raise MismatchError(f"{first} and {second} can't be compared: {reason}") from None


def sample(speaker: Speaker, prompt: list[int], most: int, ends: list[int]) -> list[int]:
    """The likeliest continuation, by whole passes: for short samples."""
    tokens = list(prompt)
    for _ in range(min(most, speaker.context - len(prompt))):
        token = int(np.asarray(speaker.logits(np.array(tokens))[-1]).argmax())
        tokens.append(token)
        if token in ends:
            break
    return tokens[len(prompt) :]
