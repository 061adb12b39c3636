"""One side of a comparison, in a process of its own: seconds of a step, and peak memory above the imports'."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from a1q.distill.cache import TeacherBatch
from a1q.distill.head import head_of
from a1q.distill.losses import Terms, asked_of, loss_of
from a1q.training.device import recompute_layers
from benchmarks.training.shapes import LENGTH, SEQUENCES, VOCABULARY, linears, model, trained_parts

TOP_K, NEGATIVES = 128, 128
SETS: dict[str, tuple[str, ...] | None] = {
    "plain": None,
    "scales": ("scales",),
    "scales, lut": ("scales", "lut"),
    "weights, scales": ("weights", "scales"),
    "weights, scales, lut": ("weights", "scales", "lut"),
}


def peak_bytes(device: str) -> int:
    """Of this process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def casting(device: str, kind: str) -> AbstractContextManager[Any]:
    """Mixed precision."""
    return nullcontext() if kind == "fp32" else torch.autocast(device, {"bf16": torch.bfloat16}[kind])


def measured(device: str, steps: int, prepare: Callable[[], Callable[[], None]]) -> dict[str, float]:
    """Least seconds of a step and peak bytes, both after one step that doesn't count for time."""
    if device == "cuda":
        torch.zeros(1, device=device)
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = peak_bytes(device)
    step, seconds = prepare(), []
    for _ in range(steps + 1):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds[1:] or seconds), "bytes": peak_bytes(device) - before}


def linears_step(
    side: str, device: str, kind: str, layers: int, ranks: tuple[int, int] = (1, 1), form: str = "dense"
) -> Callable[[], None]:
    """Forward, backward and AdamW of a model's linears, each with its own input and upstream gradient."""
    torch.manual_seed(0)
    modules = [module.to(device) for module in linears(SETS[side], layers, ranks, form)]
    optimizer = torch.optim.AdamW([item for module in modules for item in trained_parts(module)], lr=1e-6, fused=True)
    states = {size: torch.randn(SEQUENCES, LENGTH, size, device=device) for size in (1024, 2048, 3072)}

    def step() -> None:
        for module in modules:
            with casting(device, kind):
                y = module(states[module.in_features].requires_grad_())
            y.backward(states[module.out_features].detach().to(y.dtype))
        for state in states.values():
            state.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def model_step(
    side: str, device: str, kind: str, layers: int, everything: bool = False, recompute: bool = False
) -> Callable[[], None]:
    """Forward, distillation loss from the head tile by tile, backward and AdamW of a whole model."""
    student = model(SETS[side], layers, everything).to(device)
    student.train()
    if recompute:
        recompute_layers(student)
    optimizer = torch.optim.AdamW(trained_parts(student), lr=1e-6, fused=True)
    places = (SEQUENCES, LENGTH)
    ids = torch.randint(VOCABULARY, (*places, TOP_K + NEGATIVES), device=device)
    values = torch.randn(*places, TOP_K + NEGATIVES, device=device) - 12
    batch = TeacherBatch(
        tokens=torch.randint(VOCABULARY, places, device=device),
        ids=ids[..., :TOP_K],
        logits=values[..., :TOP_K],
        negatives=ids[..., TOP_K:],
        negative_logits=values[..., TOP_K:],
        lse=torch.zeros(places, device=device),
        vocabulary=VOCABULARY,
        starts=torch.zeros(places, dtype=torch.bool, device=device),
    )
    head, terms = head_of(student), Terms()
    assert head is not None

    def step() -> None:
        with casting(device, kind):
            states = student.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
            answers = head.partitions_and_picked(states, asked_of(batch, terms), terms.temperatures)
        loss_of(*answers, batch, terms)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
