"""Training and held-out loss of a student against a cached teacher, as the training loop takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.distill.cache import TeacherCache
from a1q.distill.losses import Terms, tail_problem
from a1q.engine.stage import Runtime
from a1q.errors import MismatchError, StageError
from a1q.models.view import PREPARED
from a1q.training.batches import batch_rows
from a1q.training.width import tiled

if TYPE_CHECKING:
    from torch import Tensor

ROTATES = "rotate_residual"
"""The preparation that changes the basis of hidden states."""


@dataclass(frozen=True)
class Objective:
    """What training minimizes; see the schema of a stage that trains."""

    kd: str
    temperature: float
    hard_top1: float
    hard_full: float
    tail: str
    online: bool
    local: float


@dataclass(frozen=True)
class BatchConfig:
    """Sequences per micro-batch, and micro-batches per step."""

    sequences: int
    accumulate: int


def stream_problem(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    """Say why hidden states of two models can't be compared layer by layer, from their configs; empty if they can."""
    names = ("num_hidden_layers", "hidden_size")
    (layers, size), (others, width) = ([config.get(name) for name in names] for config in (student, teacher))
    if (layers, size) != (others, width):
        return f"the student has {layers} layers of width {size}, the teacher {others} of {width}"
    if (ROTATES in student.get(PREPARED, ())) != (ROTATES in teacher.get(PREPARED, ())):
        return f"`{ROTATES}` has put those of one of the two in another basis"
    return ""


class Distillation:
    """The two callables of `run_loop` for one student and one teacher cache."""

    def __init__(
        self,
        model: Any,
        cache: TeacherCache,
        objective: Objective,
        batch: BatchConfig,
        runtime: Runtime,
        seed: int,
        evaluate_sequences: int,
        teacher: Any = None,
    ):
        """Check that student, cache and objective fit each other.

        Args:
            teacher: the model behind the cache, on the student's device, where the objective is `online`.

        Raises:
            MismatchError: if the vocabularies differ, or with `local` the layers.
            StageError: if the cache has no sequences, or can't serve the objective.
        """
        if model.config.vocab_size != cache.vocabulary:
            raise MismatchError(
                f"the student's vocabulary is {model.config.vocab_size}, the teacher's {cache.vocabulary}"
            )
        assert (teacher is not None) == objective.online
        if objective.local:
            problem = stream_problem(model.config.to_dict(), teacher.config.to_dict())
            if problem:
                raise MismatchError(f"`local` compares hidden states layer by layer, and {problem}")
        elif not objective.online:
            rest = cache.vocabulary - cache.meta["top_k"]
            problem = tail_problem(objective.tail, objective.temperature, cache.meta["random_negatives"], rest)
            if problem:
                raise StageError(problem)
        if not cache.size("train"):
            raise StageError(f"the teacher cache {cache.folder} has no training sequences")
        from a1q.training.step_loss import DistillationLoss

        self.model, self.cache, self.batch, self.seed = model, cache, batch, seed
        self.device = next(model.parameters()).device
        self.tune_rows = min(evaluate_sequences, cache.size("tune"))
        self.loss = DistillationLoss(
            model,
            teacher,
            Terms(objective.temperature, objective.hard_top1, objective.hard_full, objective.tail),
            held_out=Terms(tail="negatives" if cache.meta["random_negatives"] else "bucket"),
            local=objective.local,
            tiled=tiled(batch.sequences * cache.seq_len, cache.vocabulary),
            runtime=runtime,
        )

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        """Mean loss per token of one micro-batch."""
        count = self.batch.sequences
        start = (step * self.batch.accumulate + micro) * count
        return self._loss(batch_rows(self.seed, start, count, self.cache.size("train")), "train")

    def held_out(self) -> Callable[[], float] | None:
        """`evaluate`, or None where the cache has no held-out part."""
        return self.evaluate if self.tune_rows else None

    def evaluate(self) -> float:
        """KL in nats per token, teacher to student, on the held-out part; at temperature 1 whatever the objective. It
        is exact beside a teacher that runs along."""
        import torch

        training = self.model.training
        self.model.eval()
        total = tokens = 0.0
        with torch.no_grad():
            for start in range(0, self.tune_rows, self.batch.sequences):
                rows = list(range(start, min(start + self.batch.sequences, self.tune_rows)))
                loss, figures = self._loss(rows, "tune")
                total += float(loss) * figures["tokens"]
                tokens += figures["tokens"]
        self.model.train(training)
        return total / tokens

    def _loss(self, rows: list[int], part: str) -> tuple[Tensor, dict[str, float]]:
        batch = self.cache.batch(rows, part, self.device)
        loss, terms = self.loss(batch, held_out=part == "tune")
        return loss, {"tokens": float(batch.tokens.numel()), **{name: float(term) for name, term in terms.items()}}
