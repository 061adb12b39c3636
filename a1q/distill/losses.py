r"""The distillation loss over a cached teacher.

Notation: teacher p, student q, C the K cached candidates, N the R random negatives, w = (V - K)/R. The student's
partition is always exact (its logits are all there). The loss per position is T² KL(p_T || q_T) with, by `tail`,

* `candidates`: both softmaxes over C alone, as published for this family of methods. The student's tail is free.
* `bucket`: C plus one bucket that holds the rest, sum_C p log(p/q) + P log(P/Q), P = 1 - p(C), Q = 1 - q(C).
  A lower bound of the full KL (grouping outcomes can't raise it); says nothing about the order within the rest.
* `negatives`: since p and q both sum to 1, the full KL is sum_V f with f = p log(p/q) - p + q >= 0. The sum is exact
  over C and estimated over the rest by w sum_N f. At T = 1 value and gradient are unbiased; every sampled term
  vanishes, with its gradient, as q approaches p: the noise of sampling dies out as the student gets better.

The teacher's partition at T = 1 is exact (the cached logsumexp). At T != 1 it is not in the cache: its part over the
rest is estimated by the ratio estimator Z_s(rest) sum_N exp(t/T) / sum_N exp(s/T), the student's part Z_s(rest) being
known exactly. The ratio's sampling error, too, dies out as the student approaches the teacher. It is detached: the
gradient is that of the KL to a fixed teacher.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.distill.cache import TeacherBatch

TAILS = ("bucket", "negatives", "candidates")


def tail_problem(tail: str, temperature: float, random_negatives: int, rest: int) -> str:
    """Say why a cache with that many random negatives among `rest` ids outside its top-k can't serve this loss; empty
    when it can. No torch."""
    if random_negatives or not rest or tail == "candidates":
        return ""
    if tail == "negatives":
        return "tail: negatives needs random negatives, and the cache has none"
    if temperature != 1.0:
        return f"tail: {tail} at temperature {temperature:g} needs random negatives, and the cache has none"
    return ""


@dataclass(frozen=True)
class Terms:
    """What the loss is made of: T² KL + hard_top1 · CE(teacher's top-1) + hard_full · CE(next token)."""

    temperature: float = 1.0
    """T > 0, of the KL only."""
    hard_top1: float = 0.0
    """Weight of the cross-entropy with the teacher's most probable token."""
    hard_full: float = 0.0
    """Weight of the cross-entropy with the text's next token, over the positions that have one in their document."""
    tail: str = "negatives"
    """What becomes of the vocabulary outside the cached top-k; see the top of this file."""

    def check(self, batch: TeacherBatch, vocabulary: int) -> None:
        """Refuse what the teacher's word can't serve.

        Raises:
            ValueError: if the vocabularies differ, `tail` is unknown, or the cache can't serve it (`tail_problem`).
        """
        if self.tail not in TAILS:
            raise ValueError(f"tail is one of {', '.join(TAILS)}, not {self.tail!r}")
        if vocabulary != batch.vocabulary:
            raise ValueError(f"the student's vocabulary is {vocabulary}, the teacher's {batch.vocabulary}")
        rest = batch.vocabulary - batch.ids.shape[-1]
        problem = tail_problem(self.tail, self.temperature, batch.negatives.shape[-1], rest)
        if problem:
            raise ValueError(problem)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those whose partitions are asked for: T, then 1 where hard labels count too."""
        return (self.temperature,) if not self.hard or self.temperature == 1.0 else (self.temperature, 1.0)

    @property
    def hard(self) -> bool:
        """Whether hard labels count."""
        return bool(self.hard_top1 or self.hard_full)


def kd_loss(logits: Tensor, batch: TeacherBatch, **terms: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of `Terms` over all positions, in nats per token.

    Args:
        logits: the student's, [B, L, V]; position t predicts token t + 1. Computed on in float32.
        batch: the teacher's word on the same tokens.
        terms: the fields of `Terms`.

    Returns:
        The scalar loss and its detached terms: `kl` (with its T²), and `hard_top1` and `hard_full` (without their
        weights) where their weight isn't 0.

    Raises:
        ValueError: as `Terms.check`.
    """
    import torch

    wanted = Terms(**terms)
    wanted.check(batch, logits.shape[-1])
    logits = logits.float() if logits.dtype != torch.float64 else logits
    partition, picked = _partition_and_picked()(logits, asked_of(batch), wanted.temperature)
    partitions = (partition, *(torch.logsumexp(logits / t, dim=-1) for t in wanted.temperatures[1:]))
    return loss_of(partitions, picked, batch, wanted)


def asked_of(batch: TeacherBatch) -> Tensor:
    """The ids [B, L, K + R + 1] whose logits the loss asks for: the top-k, the negatives, the next token.

    A sequence's last position has no next token: its first stands there, and does not count.
    """
    import torch

    following = torch.cat([batch.tokens[:, 1:], batch.tokens[:, :1]], dim=1).unsqueeze(-1)
    return torch.cat([batch.ids, batch.negatives, following], dim=-1)


def loss_of(
    partitions: Sequence[Tensor], picked: Tensor, batch: TeacherBatch, terms: Terms
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and detached terms, as `kd_loss` gives them, of what it needs to know of the student.

    Args:
        partitions: logsumexp(logits / T) [B, L] for each of `terms.temperatures`.
        picked: logits [B, L, I] at `asked_of(batch)`.
    """
    kept, sampled = batch.ids.shape[-1], batch.negatives.shape[-1]
    temperature, partition = terms.temperature, partitions[0].unsqueeze(-1)
    top, negatives, target = picked.split([kept, sampled, 1], dim=-1)
    student_top, student_negatives = top / temperature - partition, negatives / temperature - partition
    kl = temperature**2 * _divergences(batch, terms, student_top, student_negatives).mean()
    loss, found = kl, {"kl": kl}
    if terms.hard_top1:
        found["hard_top1"] = (partitions[-1] - top[..., 0]).mean()
        loss = loss + terms.hard_top1 * found["hard_top1"]
    if terms.hard_full:
        counts = batch.continues[:, :-1]
        losses = (partitions[-1] - target[..., 0])[:, :-1]
        found["hard_full"] = losses.where(counts, 0).sum() / counts.sum().clamp_min(1)
        loss = loss + terms.hard_full * found["hard_full"]
    return loss, {name: term.detach() for name, term in found.items()}


def _divergences(batch: TeacherBatch, terms: Terms, student_top: Tensor, student_negatives: Tensor) -> Tensor:
    """KL at T [B, L], without T², from the student's log-probabilities."""
    import torch

    teacher_top, teacher_negatives = _teacher_log_probs(batch, terms.temperature, student_top, student_negatives)
    if terms.tail == "candidates":
        return _sum_kl(torch.log_softmax(teacher_top, dim=-1), torch.log_softmax(student_top, dim=-1))
    if terms.tail == "bucket":
        found = _sum_kl(teacher_top, student_top)
        return found + _bucket(teacher_top, student_top) if batch.ids.shape[-1] < batch.vocabulary else found
    found = _sum_divergence(teacher_top, student_top)
    if teacher_negatives is None:
        return found
    return found + batch.negative_weight * _sum_divergence(teacher_negatives, student_negatives)


def _teacher_log_probs(
    batch: TeacherBatch, temperature: float, student_top: Tensor, student_negatives: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The teacher's log-probabilities at T over the candidates [B, L, K] and the negatives [B, L, R].

    The student's, which enter the estimate of the teacher's partition at T != 1, have the same shapes.
    """
    import torch

    top, negatives = batch.logits / temperature, batch.negative_logits
    if negatives is not None:
        negatives = negatives / temperature
    if temperature == 1.0:
        partition = batch.lse
    else:
        partition = torch.logsumexp(top, dim=-1)
        if negatives is not None:
            rest = _remaining_mass(student_top.detach()).log()
            ratio = torch.logsumexp(negatives, dim=-1) - torch.logsumexp(student_negatives.detach(), dim=-1)
            partition = torch.logaddexp(partition, rest + ratio)
    partition = partition.unsqueeze(-1)
    return top - partition, None if negatives is None else negatives - partition


def _sum_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """sum p log(p/q) over the last dimension, from log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def _sum_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """sum of p log(p/q) - p + q over the last dimension, from log-probabilities."""
    p = teacher.exp()
    return (p * (teacher - student) - p + student.exp()).sum(dim=-1)


def _remaining_mass(top: Tensor) -> Tensor:
    """The probability [B, L] that log-probabilities [B, L, K] leave over, at least the rounding error of float32."""
    import torch

    return (1 - top.exp().sum(dim=-1)).clamp_min(torch.finfo(torch.float32).eps)


def _bucket(teacher_top: Tensor, student_top: Tensor) -> Tensor:
    """P log(P/Q) [B, L] of the masses that the teacher's and the student's log-probabilities [B, L, K] leave over."""
    p, q = _remaining_mass(teacher_top), _remaining_mass(student_top)
    return p * (p.log() - q.log())


@functools.cache
def _partition_and_picked() -> Any:
    """A function (logits [B, L, V], index [B, L, I], T) -> logsumexp(logits/T) [B, L], logits at index [B, L, I].

    As one autograd node it needs one [B, L, V] buffer in the backward pass; the two operations apart need three,
    and at a real vocabulary that buffer is the largest thing in a training step.
    """
    import torch

    class PartitionAndPicked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
            partition = torch.logsumexp(logits if temperature == 1.0 else logits / temperature, dim=-1)
            ctx.save_for_backward(logits, index, partition)
            ctx.temperature = temperature
            return partition, logits.gather(-1, index)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
            logits, index, partition = ctx.saved_tensors
            grad_partition, grad_picked = grads
            grad = logits / ctx.temperature
            grad.sub_(partition.unsqueeze(-1)).exp_().mul_((grad_partition / ctx.temperature).unsqueeze(-1))
            return grad.scatter_add_(-1, index, grad_picked), None, None

    return PartitionAndPicked.apply
