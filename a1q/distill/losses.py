r"""The distillation loss over a cached teacher.

Notation: teacher p, student q, C the K cached candidates, N the R random negatives, w = (V - K)/R. The student's
partition is always exact (its logits are all there). The loss per position is T² KL(p_T || q_T) with, by `tail`,

* `candidates`: both softmaxes over C alone, as published for this family of methods. The student's tail is free.
* `bucket`: C plus one bucket that holds the rest, sum_C p log(p/q) + P log(P/Q), P = 1 - p(C), Q = 1 - q(C).
  A lower bound of the full KL (grouping outcomes can't raise it); says nothing about the order within the rest.
* `negatives`: since p and q both sum to 1, the full KL is sum_V f with f = p log(p/q) - p + q >= 0. The sum is exact
  over C and estimated over the rest by w sum_N f. At T = 1 value and gradient are unbiased; every sampled term
  vanishes, with its gradient, as q approaches p: the noise of sampling dies out as the student gets better.

The teacher's partition at T = 1 is exact (the cached logsumexp), and so it is at the temperatures that the cache was
told (`TeacherBatch.partitions`). At others its part over the rest is estimated by the ratio estimator
Z_s(rest) sum_N exp(t/T) / sum_N exp(s/T), the student's part Z_s(rest) being known exactly. The ratio's sampling error,
too, dies out as the student approaches the teacher. It is detached: the gradient is that of the KL to a fixed teacher.

What is meant by `targets`: with `all` the KL and the teacher's top-1 count at every position, the next token where the
document goes on. With `assistant` every term counts where the next token is one that an assistant said, and only there.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.distill.divergence import cross_entropy, kl, mean_over, partial_kl

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.distill.cache import TeacherBatch

TAILS = ("bucket", "negatives", "candidates")
ASSISTANT = "assistant"
"""The value of `targets` that leaves out what no assistant said."""


def tail_problem(tail: str, temperature: float, random_negatives: int, rest: int, known: Collection[float] = ()) -> str:
    """Say why a cache with that many random negatives among `rest` ids outside its top-k, and partitions at the
    `known` temperatures, can't serve this loss; empty when it can. No torch."""
    if random_negatives or not rest or tail == "candidates":
        return ""
    if tail == "negatives":
        return "tail: negatives needs random negatives, and the cache has none"
    if temperature != 1.0 and temperature not in known:
        return (
            f"tail: {tail} at temperature {temperature:g} needs the teacher's partition there, or random negatives to "
            "estimate it from, and the cache has none"
        )
    return ""


@dataclass(frozen=True)
class Terms:
    """What the loss is made of: kl · T² KL + hard_top1 · CE(teacher's top-1) + hard_full · CE(next token)."""

    temperature: float = 1.0
    """T > 0, of the KL only."""
    hard_top1: float = 0.0
    """Weight of the cross-entropy with the teacher's most probable token."""
    hard_full: float = 0.0
    """Weight of the cross-entropy with the text's next token, over the positions that have one in their document."""
    tail: str = "negatives"
    """What becomes of the vocabulary outside the cached top-k; see the top of this file."""
    kl: float = 1.0
    """Weight of the KL; at 0 it is not computed."""
    targets: str = "all"
    """`all` or `assistant`: which predictions count; see the top of this file."""

    def check(self, batch: TeacherBatch, vocabulary: int) -> None:
        """Refuse what the teacher's word can't serve.

        Raises:
            ValueError: if the vocabularies differ, `tail` is unknown, or the cache can't serve it (`tail_problem`), or
                doesn't know what an assistant said.
        """
        if self.tail not in TAILS:
            raise ValueError(f"tail is one of {', '.join(TAILS)}, not {self.tail!r}")
        if vocabulary != batch.vocabulary:
            raise ValueError(f"the student's vocabulary is {vocabulary}, the teacher's {batch.vocabulary}")
        if self.targets == ASSISTANT and batch.said is None:
            raise ValueError("the cache doesn't know which tokens an assistant said")
        if not self.kl:
            return
        rest = batch.vocabulary - batch.ids.shape[-1]
        problem = tail_problem(self.tail, self.temperature, batch.negatives.shape[-1], rest, batch.partitions)
        if problem:
            raise ValueError(problem)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those whose partitions are asked for: T, then 1 where hard labels count too."""
        if not self.kl:
            return (1.0,)
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
        The scalar loss and its detached terms, without their weights, where those aren't 0: `kl` (with its T²),
        `hard_top1` and `hard_full`.

    Raises:
        ValueError: as `Terms.check`.
    """
    wanted = Terms(**terms)
    wanted.check(batch, logits.shape[-1])
    return loss_of(*answers(logits, asked_of(batch, wanted), wanted.temperatures), batch, wanted)


def answers(logits: Tensor, index: Tensor, temperatures: Sequence[float]) -> tuple[tuple[Tensor, ...], Tensor]:
    """What every loss asks of a student: logsumexp(logits / T) [B, L] for every T, and its logits [B, L, I] at `index`.

    `a1q.distill.head.Head` answers the same from states, tile by tile.

    Args:
        logits: [B, L, V]; computed on in float32, or in float64 as they are.
        index: int64 [B, L, I].
    """
    import torch

    logits = logits.float() if logits.dtype != torch.float64 else logits
    partition, picked = _partition_and_picked()(logits, index, temperatures[0])
    return (partition, *(torch.logsumexp(logits / t, dim=-1) for t in temperatures[1:])), picked


def asked_of(batch: TeacherBatch, terms: Terms) -> Tensor:
    """The ids whose logits the loss asks for: the top-k, the negatives, the next token, [B, L, K + R + 1]; where the KL
    has no weight the top-1 and the next token, [B, L, 2]."""
    import torch

    if not terms.kl:
        return torch.cat([batch.top1.unsqueeze(-1), following(batch.tokens)], dim=-1)
    return torch.cat([batch.ids, batch.negatives, following(batch.tokens)], dim=-1)


def following(tokens: Tensor) -> Tensor:
    """The next token [B, L, 1] of every position of [B, L].

    A sequence's last position has none: its first token stands there, and does not count.
    """
    return tokens.roll(-1, dims=1).unsqueeze(-1)


def loss_of(
    partitions: Sequence[Tensor], picked: Tensor, batch: TeacherBatch, terms: Terms
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and detached terms, as `kd_loss` gives them, of what it needs to know of the student.

    Args:
        partitions: logsumexp(logits / T) [B, L] for each of `terms.temperatures`.
        picked: logits [B, L, I] at `asked_of(batch, terms)`.
    """
    if not terms.kl:
        return total_of(None, partitions[-1], picked[..., 0], picked[..., 1], terms, batch)
    kept, sampled = batch.ids.shape[-1], batch.negatives.shape[-1]
    temperature, partition = terms.temperature, partitions[0].unsqueeze(-1)
    top, negatives, target = picked.split([kept, sampled, 1], dim=-1)
    student_top, student_negatives = top / temperature - partition, negatives / temperature - partition
    divergences = _divergences(batch, terms, student_top, student_negatives)
    return total_of(divergences, partitions[-1], top[..., 0], target[..., 0], terms, batch)


def total_of(
    divergences: Tensor | None, partition: Tensor, top1: Tensor, target: Tensor, terms: Terms, batch: TeacherBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its detached terms, of the divergences and of what hard labels need to know.

    Args:
        divergences: KL at T [B, L], without T²; None where it has no weight.
        partition: the student's logsumexp(logits) [B, L]; looked at where hard labels count.
        top1: its logit [B, L] of the teacher's most probable token.
        target: its logit [B, L] of the next token; the last position's does not count.
        batch: says which positions count, and what to divide by.
    """
    import torch

    counts, over = batch.continues, batch.targets
    everywhere: tuple[Tensor | None, float | None] = (None, None)
    if terms.targets == ASSISTANT:
        counts = counts & batch.says
        everywhere = counts, over
    weighed: list[Tensor] = []
    found: dict[str, Tensor] = {}
    if divergences is not None:
        found["kl"] = terms.temperature**2 * mean_over(divergences, *everywhere)
        weighed.append(found["kl"] if terms.kl == 1.0 else terms.kl * found["kl"])
    if terms.hard_top1:
        found["hard_top1"] = cross_entropy(partition, top1, *everywhere)
        weighed.append(terms.hard_top1 * found["hard_top1"])
    if terms.hard_full:
        found["hard_full"] = next_token_loss(partition, target, counts, over)
        weighed.append(terms.hard_full * found["hard_full"])
    loss = sum(weighed[1:], weighed[0]) if weighed else torch.zeros_like(partition[0, 0])
    return loss, {name: term.detach() for name, term in found.items()}


def next_token_loss(
    partition: Tensor, target: Tensor, counts: Tensor | None = None, targets: float | None = None
) -> Tensor:
    """Mean cross-entropy with the next token, in nats, over the positions that have one.

    Args:
        partition: logsumexp(logits) [B, L].
        target: the logit [B, L] of the next token (`following`).
        counts: bool [B, L]: position t counts, so the prediction of token t + 1; None for all but the last, which never
            does.
        targets: what to divide the sum by; None: by how many count.
    """
    return cross_entropy(partition[:, :-1], target[:, :-1], None if counts is None else counts[:, :-1], targets)


def _divergences(batch: TeacherBatch, terms: Terms, student_top: Tensor, student_negatives: Tensor) -> Tensor:
    """KL at T [B, L], without T², from the student's log-probabilities."""
    import torch

    teacher_top, teacher_negatives = _teacher_log_probs(batch, terms.temperature, student_top, student_negatives)
    if terms.tail == "candidates":
        return kl(torch.log_softmax(teacher_top, dim=-1), torch.log_softmax(student_top, dim=-1))
    if terms.tail == "bucket":
        found = kl(teacher_top, student_top)
        return found + _bucket(teacher_top, student_top) if batch.ids.shape[-1] < batch.vocabulary else found
    found = partial_kl(teacher_top, student_top)
    if teacher_negatives is None:
        return found
    return found + batch.negative_weight * partial_kl(teacher_negatives, student_negatives)


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
    elif temperature in batch.partitions:
        partition = batch.partitions[temperature]
    else:
        partition = torch.logsumexp(top, dim=-1)
        if negatives is not None:
            rest = _remaining_mass(student_top.detach()).log()
            ratio = torch.logsumexp(negatives, dim=-1) - torch.logsumexp(student_negatives.detach(), dim=-1)
            partition = torch.logaddexp(partition, rest + ratio)
    partition = partition.unsqueeze(-1)
    return top - partition, None if negatives is None else negatives - partition


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
