"""How far an imported model is from the one it was trained from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a1q.data import Sequences

ORDER = 0
"""Seed of the order of the documents, that of `eval`."""


def read_text(source: str, base: Path, sequences: int, length: int) -> Sequences:
    """Sequences of the test side of a data source, in the tokens of the base.

    Raises:
        StageError, MismatchError: as `a1q.data.read_sequences` does.
    """
    from a1q.data import read_sequences

    return read_sequences({"source": source}, base, "test", length, sequences, ORDER)


def divergence(
    model: Any, base: Path, text: Sequences, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, float]:
    """`kl` from the base to the model in nats per token over the whole vocabulary, `top1`, `ppl` and `teacher_ppl`."""
    from a1q.distill.evaluate import evaluate_model
    from a1q.models.checkpoint import load_model

    teacher = load_model(base)
    return evaluate_model(model, teacher, text.tokens, borders=text.borders, batch_size=4, progress=progress)
