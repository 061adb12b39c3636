"""The one distillation loop that every trained method runs, whatever it quantizes with.

It needs torch, and two modules of a1q that need nothing else, so that the peers' environment can import it with the
root of the repository on its path.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from a1q.distill.divergence import kl
from a1q.training.schedule import learning_rate_factor


def distill(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    tokens: Tensor,
    groups: Sequence[Mapping[str, Any]],
    steps: int,
    batch: int = 16,
    warmup: int = 5,
    final_lr: float = 0.01,
    clip: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Train `student` towards `teacher` by KL(teacher || student) over the full vocabulary, at every position.

    AdamW with betas (0.9, 0.999) and without weight decay; the learning rate rises over `warmup` steps and falls on a
    cosine to `final_lr` of its peak at the last one. Deterministic on the CPU, thread count included.

    Args:
        student: changed in place; its output has `.logits` [b, L, V]. Parameters outside `groups` stay as they are.
        teacher: answers online, without gradients.
        tokens: int64 [steps * batch, L], in the order of training.
        groups: `{"params": list of parameters, "lr": peak}` each.
        clip: the gradients' norm, of all groups together, is cut to this.
        seed: of torch's generator, for methods that draw numbers.

    Returns:
        `losses`: KL in nats per token, one of each step before its update; `seconds`: of the loop.
    """
    if len(tokens) < steps * batch:
        raise ValueError(f"{steps} steps of {batch} sequences need {steps * batch}, there are {len(tokens)}")
    torch.manual_seed(seed)
    wanted = [parameter for group in groups for parameter in group["params"]]
    student.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    modes = student.training, teacher.training
    student.train()
    teacher.eval()
    losses = []
    began = time.perf_counter()
    for step in range(steps):
        ids = tokens[step * batch : (step + 1) * batch]
        with torch.no_grad():
            target = log_softmax(teacher(input_ids=ids, use_cache=False).logits.float(), dim=-1)
        answer = log_softmax(student(input_ids=ids, use_cache=False).logits.float(), dim=-1)
        loss = kl(target, answer).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, clip)
        factor = learning_rate_factor(step, steps, warmup, "cosine", final_lr)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    student.train(modes[0])
    teacher.train(modes[1])
    return {"losses": losses, "seconds": seconds}
