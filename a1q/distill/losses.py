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


def kd_loss(
    logits: Tensor,
    batch: TeacherBatch,
    *,
    temperature: float = 1.0,
    hard_top1: float = 0.0,
    hard_full: float = 0.0,
    tail: str = "negatives",
) -> tuple[Tensor, dict[str, Tensor]]:
    """T² KL + hard_top1 · CE(teacher's top-1) + hard_full · CE(next token), in nats per token.

    Args:
        logits: the student's, [B, L, V]; position t predicts token t + 1. Computed on in float32.
        batch: the teacher's word on the same tokens.
        temperature: T > 0, of the KL only.
        hard_top1: weight of the cross-entropy with the teacher's most probable token.
        hard_full: weight of the cross-entropy with the text's next token (L - 1 positions).
        tail: what becomes of the vocabulary outside the cached top-k; see the top of this file.

    Returns:
        The scalar loss and its detached terms: `kl` (with its T²), and `hard_top1` and `hard_full` (without their
        weights) where their weight isn't 0.

    Raises:
        ValueError: if the vocabularies differ, `tail` is unknown, or the cache can't serve it (`tail_problem`).
    """
    import torch

    if tail not in TAILS:
        raise ValueError(f"tail is one of {', '.join(TAILS)}, not {tail!r}")
    if logits.shape[-1] != batch.vocabulary:
        raise ValueError(f"the student's vocabulary is {logits.shape[-1]}, the teacher's {batch.vocabulary}")
    rest = batch.vocabulary - batch.ids.shape[-1]
    problem = tail_problem(tail, temperature, batch.negatives.shape[-1], rest)
    if problem:
        raise ValueError(problem)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    kept, sampled = batch.ids.shape[-1], batch.negatives.shape[-1]
    following = torch.cat([batch.tokens[:, 1:], batch.tokens[:, :1]], dim=1).unsqueeze(-1)
    index = torch.cat([batch.ids, batch.negatives, following], dim=-1)
    partition, picked = _partition_and_picked()(logits, index, temperature)
    top, negatives, target = picked.split([kept, sampled, 1], dim=-1)

    student_top = top / temperature - partition.unsqueeze(-1)
    student_negatives = negatives / temperature - partition.unsqueeze(-1)
    teacher_top, teacher_negatives = _teacher_log_probs(batch, temperature, student_top, student_negatives)
    if tail == "candidates":
        per_position = _sum_kl(torch.log_softmax(teacher_top, dim=-1), torch.log_softmax(student_top, dim=-1))
    elif tail == "bucket":
        per_position = _sum_kl(teacher_top, student_top)
        if kept < batch.vocabulary:
            per_position = per_position + _bucket(teacher_top, student_top)
    else:
        per_position = _sum_divergence(teacher_top, student_top)
        if teacher_negatives is not None:
            per_position = per_position + batch.negative_weight * _sum_divergence(teacher_negatives, student_negatives)
    kl = temperature**2 * per_position.mean()

    loss, terms = kl, {"kl": kl.detach()}
    if hard_top1 or hard_full:
        plain = partition if temperature == 1.0 else torch.logsumexp(logits, dim=-1)
        if hard_top1:
            terms["hard_top1"] = term = (plain - top[..., 0]).mean()
            loss = loss + hard_top1 * term
        if hard_full:
            terms["hard_full"] = term = (plain - target[..., 0])[:, :-1].mean()
            loss = loss + hard_full * term
    return loss, {name: term.detach() for name, term in terms.items()}


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
