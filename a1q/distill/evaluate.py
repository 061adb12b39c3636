"""How far a student is from its teacher, and how well it predicts text, over the full vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.distill.divergence import kl
from a1q.models.positions import passed

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def evaluate_model(
    student: torch.nn.Module,
    teacher: torch.nn.Module | None,
    tokens: np.ndarray,
    *,
    borders: np.ndarray | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Compare two causal language models on token sequences.

    Logits are taken in float32, one sequence at a time, and summed in float64.

    Args:
        student: on `device`; left in the mode (training or evaluation) it came in. So is `teacher`.
        teacher: None for the figures of the student alone.
        tokens: integers [n, L], L >= 2.
        borders: bool [n, L], where documents begin that attention stays within, and whose first token nothing
            predicts; None: each sequence is one text.
        progress: called with (sequences done, n) after every batch.

    Returns:
        `loss`: cross-entropy of the next token, nats per token, over the L - 1 predictions of every sequence, less
        those across `borders`; `ppl`: its exponential; `tokens`: n · L. With a teacher also `teacher_ppl`, and over all
        n · L positions `kl`: KL(teacher || student) in nats per token, and `top1`: the share where both rank the same
        token first.
    """
    import torch

    models = [student] if teacher is None else [student, teacher]
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    losses = [0.0 for _ in models]
    divergence, agreed = 0.0, 0
    predicted = np.ones((len(tokens), tokens.shape[1] - 1), dtype=bool) if borders is None else ~borders[:, 1:]
    with torch.inference_mode():
        for first in range(0, len(tokens), batch_size):
            some = slice(first, first + batch_size)
            ids = torch.from_numpy(np.asarray(tokens[some], dtype=np.int64)).to(device)
            begins = None if borders is None else torch.from_numpy(borders[some].copy())
            outputs = [model(**passed(ids, begins)).logits for model in models]
            for row in range(len(ids)):
                counted = torch.from_numpy(predicted[first + row])
                log_probs = [torch.log_softmax(logits[row].float(), dim=-1) for logits in outputs]
                for index, item in enumerate(log_probs):
                    said = _float64(item[:-1].gather(-1, ids[row, 1:, None]))[:, 0]
                    losses[index] -= said[counted].sum().item()
                if teacher is not None:
                    divergence += _float64(kl(log_probs[1], log_probs[0])).sum().item()
                    agreed += int((log_probs[0].argmax(dim=-1) == log_probs[1].argmax(dim=-1)).sum())
            if progress is not None:
                progress(min(first + batch_size, len(tokens)), len(tokens))
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)

    count, length = tokens.shape
    means = [loss / max(int(predicted.sum()), 1) for loss in losses]
    found: dict[str, float] = {"loss": means[0], "ppl": _exp(means[0]), "tokens": count * length}
    if teacher is not None:
        found["teacher_ppl"] = _exp(means[1])
        found["kl"] = divergence / (count * length)
        found["top1"] = agreed / (count * length)
    return found


def _float64(values: Tensor) -> Any:
    return values.cpu().double()  # Metal has no float64


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
