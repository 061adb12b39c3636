"""The distillation loss beside a teacher that runs along: its whole distribution is there, and nothing is estimated.

With t and s the logits of teacher and student over T, and p = softmax(t), the loss per position is

    T² KL(p || q) = T² (gap + logsumexp(s)),   gap = Σ p (t - s) - logsumexp(t),

in which differences of logits are summed, not logits: what both have in common is not there to be rounded. The
gradient by the student's logits is T (q - p). Hard labels are those of `a1q.distill.losses.Terms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from a1q.distill.losses import Terms, answers, following, total_of

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.distill.cache import TeacherBatch


def exact_loss(logits: Tensor, teacher: Tensor, batch: TeacherBatch, **terms: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of `Terms` over all positions, in nats per token, and its detached terms, as `kd_loss` gives them.

    Args:
        logits: the student's, [B, L, V].
        teacher: the teacher's, [B, L, V]; they get no gradient.
        batch: its tokens alone count, where documents begin, and what an assistant said.
        terms: the fields of `Terms`, with a weight of the KL; `tail` says nothing here.

    Raises:
        ValueError: if the vocabularies differ.
    """
    import torch

    if logits.shape != teacher.shape:
        raise ValueError(f"the student's vocabulary is {logits.shape[-1]}, the teacher's {teacher.shape[-1]}")
    wanted = Terms(**terms)
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits, teacher = logits.to(kind), teacher.detach().to(kind)
    index = torch.cat([teacher.argmax(-1, keepdim=True), following(batch.tokens)], dim=-1)
    partitions, picked = answers(logits, index, wanted.temperatures)
    scaled = teacher / wanted.temperature
    partition = torch.logsumexp(scaled, dim=-1)
    shares = (scaled - partition.unsqueeze(-1)).exp_()
    gap = (shares * (scaled - logits / wanted.temperature)).sum(-1) - partition
    return exact_loss_of(partitions, picked, gap, wanted, batch)


def exact_loss_of(
    partitions: Sequence[Tensor], picked: Tensor, gap: Tensor, terms: Terms, batch: TeacherBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and detached terms of what `exact_loss` needs to know of student and teacher.

    Args:
        partitions: the student's logsumexp(logits / T) [B, L] for each of `terms.temperatures`.
        picked: its logits [B, L, 2] of the teacher's top-1 and of the next token (`following`).
        gap: [B, L], see the top of this file.
        batch: says which next tokens count.
    """
    return total_of(gap + partitions[0], partitions[-1], picked[..., 0], picked[..., 1], terms, batch)
