"""Training and held-out loss of a student against a cached teacher, as the training loop takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from a1q.distill.cache import TeacherCache
from a1q.distill.losses import ASSISTANT, Terms, tail_problem
from a1q.engine.stage import Runtime, StageContext
from a1q.engine.world import ALONE, World
from a1q.errors import MismatchError, Problem, StageError
from a1q.models.view import PREPARED
from a1q.training.batches import batch_rows
from a1q.training.together import Replicas, Shards, Together, share_of
from a1q.training.width import tiled

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.module import QuantModule

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
    kl: float
    targets: str

    @property
    def terms(self) -> Terms:
        """The training loss, but for `local`."""
        return Terms(self.temperature, self.hard_top1, self.hard_full, self.tail, self.kl, self.targets)


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


def require_said(cache: TeacherCache, path: str = "") -> None:
    """Refuse a cache that doesn't say which tokens an assistant said.

    Args:
        path: of the recipe's option that asks for them.

    Raises:
        MismatchError: it says why the cache has none.
    """
    known = cache.meta.get("said") or {}
    if known.get("train"):
        return
    reason = cache.meta.get("said_problem") or "its text is not of conversations"
    if cache.knows_who:
        reason = "no assistant speaks in its training part"
    message = f"`targets: {ASSISTANT}` needs a teacher cache that knows what an assistant said, and {reason}"
    raise MismatchError([Problem(message, path=path, hint="chats as data (`format: qa`), or `targets: all`")])


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
        path: str = "",
    ):
        """Check that student, cache and objective fit each other.

        Args:
            teacher: the model behind the cache, on the student's device, where the objective is `online`.
            path: of the recipe's option that says `targets`.

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
        elif objective.kl and not objective.online:
            rest = cache.vocabulary - cache.meta["top_k"]
            negatives = cache.meta["random_negatives"]
            problem = tail_problem(objective.tail, objective.temperature, negatives, rest, cache.temperatures)
            if problem:
                raise StageError(problem)
        if not cache.size("train"):
            raise StageError(f"the teacher cache {cache.folder} has no training sequences")
        if objective.targets == ASSISTANT:
            require_said(cache, path)
        from a1q.training.step_loss import DistillationLoss

        self.model, self.cache, self.batch, self.seed = model, cache, batch, seed
        self.device = next(model.parameters()).device
        self.tune_rows = min(evaluate_sequences, cache.size("tune"))
        self.loss = DistillationLoss(
            model,
            teacher,
            objective.terms,
            held_out=Terms(tail="negatives" if cache.meta["random_negatives"] else "bucket"),
            local=objective.local,
            tiled=tiled(batch.sequences * cache.seq_len, cache.vocabulary),
            runtime=runtime,
        )
        self.training_loss: Any = self.loss
        self.world = ALONE

    @classmethod
    def begin(cls, ctx: StageContext) -> tuple[Distillation, dict[str, QuantModule]]:
        """What a stage that trains a quantized model begins with: inputs `model` and `teacher`, loaded and checked.

        `ctx.config` has `objective`, `batch`, `evaluate_sequences` and `straight_through_fp16`, which is set.

        Returns:
            The objective over the model, and the model's quantized modules by name.

        Raises:
            MismatchError: as `__init__`, and if the cache is that of another tokenizer or prompt.
            StageError: as `__init__`.
        """
        from a1q.distill.teacher_model import load_teacher
        from a1q.distill.tokenizers import require_cache_of
        from a1q.models.checkpoint import load_model
        from a1q.quant.module import quantized_modules
        from a1q.training.device import note_rounding, prepare_torch

        config, source, teacher = ctx.config, ctx.inputs["model"], ctx.inputs["teacher"]
        assert source is not None and teacher is not None
        device = prepare_torch(ctx.runtime, ctx.seed, ctx.world)
        note_rounding(ctx, config.straight_through_fp16)
        cache = TeacherCache(teacher.path)
        require_cache_of(source.path, cache.meta, f"stages.{ctx.id}.objective.kd")
        model = load_model(source.path, device=device)
        modules = dict(quantized_modules(model))
        for module in modules.values():
            module.straight_through_fp16 = config.straight_through_fp16
        along = load_teacher(teacher, ctx.inputs.get("teacher_model"), device) if config.objective.online else None
        path = f"stages.{ctx.id}.objective.targets"
        objective = cls(
            model,
            cache,
            config.objective,
            config.batch,
            ctx.runtime,
            ctx.seed,
            config.evaluate_sequences,
            along,
            path,
        )
        return objective, modules

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, dict[str, float]]:
        """Mean loss per token of one micro-batch."""
        count, size = self.batch.sequences, self.cache.size("train")
        start = step * self.batch.accumulate * count
        rows = batch_rows(self.seed, start + micro * count, count, size)
        share = None
        said = self.loss.terms.targets == ASSISTANT
        if said or self.loss.terms.hard_full:
            share = self.cache.target_share(
                batch_rows(self.seed, start, self.batch.accumulate * count, size), "train", said
            )
        return self._loss(share_of(rows, self.world), "train", share)

    def over(
        self,
        world: World,
        smoke: bool = False,
        state: Mapping[str, Tensor] | None = None,
        split: Collection[str] = (),
    ) -> Together:
        """Let the processes of `world` share the work from now on; what trains must be in place.

        Args:
            smoke: a tiny batch may grow until all have a share.
            state: what trains, by name.
            split: names of those that the processes split among them; with none, every process holds all.

        Raises:
            MismatchError: if a micro-batch has too few sequences for all of them.
        """
        self.share(world, smoke)
        if world.alone:
            return Together()
        if split:
            assert state is not None
            from a1q.models.blocks import decoder_layers

            return Shards(world, self.model.base_model, decoder_layers(self.model)[1], dict(state), split, self.device)
        replicas = Replicas(world, self.loss, self.device)
        self.training_loss = replicas.module
        return replicas

    def share(self, world: World, smoke: bool = False) -> None:
        """Let the processes of `world` share every batch from now on; arguments and errors as `over`."""
        if smoke:
            self.batch = BatchConfig(max(self.batch.sequences, world.size), self.batch.accumulate)
        if self.batch.sequences < world.size:
            message = f"`batch.sequences` is {self.batch.sequences}, and {world.size} processes share a micro-batch"
            raise MismatchError([Problem(message, hint=f"at least {world.size}, or fewer processes (`--launch`)")])
        self.world = world

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
            size = self.batch.sequences
            for start in range(0, self.tune_rows, size):
                rows = list(range(start, min(start + size, self.tune_rows)))
                own = share_of(rows, self.world)
                # A forward pass may be something that all processes do together: those without a share do it too.
                loss, figures = self._loss(own or rows[:1], "tune")
                count = figures["tokens"] if own else 0.0
                total += float(loss) * count
                tokens += count
        self.model.train(training)
        total, tokens = self.world.sums([total, tokens])
        return total / tokens

    def _loss(self, rows: list[int], part: str, target_share: float | None = None) -> tuple[Tensor, dict[str, float]]:
        batch = replace(self.cache.batch(rows, part, self.device), target_share=target_share)
        loss_of = self.training_loss if part == "train" else self.loss
        loss, terms = loss_of(batch, held_out=part == "tune")
        return loss, {"tokens": float(batch.tokens.numel()), **{name: float(term) for name, term in terms.items()}}
