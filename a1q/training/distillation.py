"""Training and held-out loss of a student against a cached teacher, as the training loop takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.distill.cache import TeacherCache
from a1q.distill.losses import Terms, asked_of, kd_loss, loss_of, tail_problem
from a1q.engine.stage import Runtime
from a1q.errors import MismatchError, StageError
from a1q.training.batches import batch_rows
from a1q.training.device import autocast

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.distill.head import Head


WIDE = 1 << 28
"""Bytes of a micro-batch's logits in float32 above which losses are taken tile by tile (`a1q.distill.head`)."""


def tiled(tokens: int, vocabulary: int) -> bool:
    """Whether so many positions' logits are too many to be held at once."""
    return 4 * tokens * vocabulary > WIDE


@dataclass(frozen=True)
class Objective:
    """What training minimizes; see the schema of a stage that trains."""

    kd: str
    temperature: float
    hard_top1: float
    hard_full: float
    tail: str


@dataclass(frozen=True)
class BatchConfig:
    """Sequences per micro-batch, and micro-batches per step."""

    sequences: int
    accumulate: int


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
    ):
        """Check that student, cache and objective fit each other.

        Raises:
            MismatchError: if the vocabularies differ.
            StageError: if the cache has no sequences, or can't serve the objective.
        """
        if model.config.vocab_size != cache.vocabulary:
            raise MismatchError(
                f"the student's vocabulary is {model.config.vocab_size}, the teacher's {cache.vocabulary}"
            )
        rest = cache.vocabulary - cache.meta["top_k"]
        problem = tail_problem(objective.tail, objective.temperature, cache.meta["random_negatives"], rest)
        if problem:
            raise StageError(problem)
        if not cache.size("train"):
            raise StageError(f"the teacher cache {cache.folder} has no training sequences")
        self.model, self.cache, self.objective, self.batch = model, cache, objective, batch
        self.runtime, self.seed = runtime, seed
        self.device = next(model.parameters()).device
        self.tune_rows = min(evaluate_sequences, cache.size("tune"))
        self.tiled = tiled(batch.sequences * cache.seq_len, cache.vocabulary)
        self._known: tuple[Any, Head | None] | None = None

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        """Mean loss per token of one micro-batch."""
        count = self.batch.sequences
        start = (step * self.batch.accumulate + micro) * count
        rows = batch_rows(self.seed, start, count, self.cache.size("train"))
        objective = self.objective
        return self._loss(
            rows,
            "train",
            temperature=objective.temperature,
            hard_top1=objective.hard_top1,
            hard_full=objective.hard_full,
            tail=objective.tail,
        )

    def held_out(self) -> Callable[[], float] | None:
        """`evaluate`, or None where the cache has no held-out part."""
        return self.evaluate if self.tune_rows else None

    def evaluate(self) -> float:
        """KL in nats per token, teacher to student, on the held-out part; at temperature 1 whatever the objective."""
        import torch

        tail = "negatives" if self.cache.meta["random_negatives"] else "bucket"
        training = self.model.training
        self.model.eval()
        total = tokens = 0.0
        with torch.no_grad():
            for start in range(0, self.tune_rows, self.batch.sequences):
                rows = list(range(start, min(start + self.batch.sequences, self.tune_rows)))
                loss, figures = self._loss(rows, "tune", tail=tail)
                total += float(loss) * figures["tokens"]
                tokens += figures["tokens"]
        self.model.train(training)
        return total / tokens

    def _loss(self, rows: list[int], part: str, **options: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.cache.batch(rows, part, self.device)
        head = self._head()
        if head is None:
            with autocast(self.runtime):
                logits = self.model(input_ids=batch.tokens, use_cache=False).logits
            loss, terms = kd_loss(logits, batch, **options)
        else:
            wanted = Terms(**options)
            wanted.check(batch, head.vocabulary)
            with autocast(self.runtime):
                states = self.model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
                answers = head.partitions_and_picked(states, asked_of(batch), wanted.temperatures)
            loss, terms = loss_of(*answers, batch, wanted)
        return loss, {"tokens": float(batch.tokens.numel()), **{name: float(term) for name, term in terms.items()}}

    def _head(self) -> Head | None:
        """The head, where losses are taken from it tile by tile. Adapters come and go: it is looked at every time."""
        if not self.tiled:
            return None
        module = self.model.get_output_embeddings()
        key = module, getattr(module, "lora_A", None) is None
        if self._known is None or self._known[0] != key:
            from a1q.distill.head import head_of

            self._known = key, head_of(self.model)
        return self._known[1]
