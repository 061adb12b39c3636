"""Where and how numbers are computed: device, threads, determinism, autocast."""

from __future__ import annotations

import contextlib
import os
import platform
import random
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.engine.stage import Runtime, StageContext
from a1q.engine.world import ALONE, World
from a1q.errors import MismatchError, Problem

if TYPE_CHECKING:
    import torch


def available_devices() -> list[str]:
    """The devices this machine can compute on, `cpu` first."""
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def prepare_torch(runtime: Runtime, seed: int, world: World = ALONE) -> torch.device:
    """Set threads, seeds and deterministic algorithms for this process, and return the device to compute on.

    Raises:
        MismatchError: if the device is not there, or there are too few for all processes; the message names those that
            are.
    """
    # cuBLAS reads this when its first handle is made; without it deterministic mode refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import numpy
    import torch

    found = available_devices()
    if runtime.device not in found:
        message = f"runtime.device is {runtime.device}, and this machine has {', '.join(found)}"
        raise MismatchError([Problem(message, hint="use `runtime: {device: auto}` or --set runtime.device=cpu")])
    torch.set_num_threads(runtime.threads)
    # Metal lacks deterministic versions of a few operations: there it is best effort, elsewhere a promise.
    torch.use_deterministic_algorithms(True, warn_only=runtime.device == "mps")
    # Filling every new buffer first costs a pass over it; we read none uninitialized.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)
    if runtime.device == "cuda" and not world.alone:
        count = torch.cuda.device_count()
        if world.local_rank >= count:
            raise MismatchError([Problem(f"this machine has {count} GPUs", hint=f"use `--launch {count}` at most")])
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    return torch.device(runtime.device)


def autocast(runtime: Runtime) -> AbstractContextManager[None]:
    """The context of a forward pass: mixed precision as `runtime.amp` says, or nothing for `no`."""
    if runtime.amp == "no":
        return contextlib.nullcontext()
    import torch

    return torch.autocast(runtime.device, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[runtime.amp])


def note_rounding(ctx: StageContext, straight_through_fp16: bool) -> None:
    """Say so where weights are rounded to fp16 and then, in products, to bf16: that is no longer what fp16 computes."""
    if straight_through_fp16 and ctx.runtime.amp == "bf16":
        ctx.log(
            "`straight_through_fp16` rounds tables and scales to fp16, and `amp: bf16` rounds weights to 8 bits in "
            "products: training sees both. With `amp: no` it sees what fp16 hardware computes"
        )


def grad_scaler(runtime: Runtime) -> torch.amp.GradScaler:
    """A loss scaler, active for fp16 on CUDA only: bf16 needs none, and neither the CPU nor Metal gains by one."""
    import torch

    return torch.amp.GradScaler(runtime.device, enabled=runtime.device == "cuda" and runtime.amp == "fp16")


def recompute_layers(model: Any) -> None:
    """Let a Hugging Face model keep only its decoder layers' inputs, and compute them again in the backward pass."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name that transformers gave it in version 5
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if hasattr(model, "_require_grads_hook"):
        # It lets embeddings require a gradient, for re-entrant checkpoints: layers below all that trains would be
        # computed again too.
        model.disable_input_require_grads()


def machine_identity(runtime: Runtime) -> dict[str, str | int]:
    """Everything about this machine and process that may change the last bit of a result."""
    import torch

    device = torch.cuda.get_device_name() if runtime.device == "cuda" else runtime.device
    return {
        "torch": torch.__version__,
        "device": device,
        "amp": runtime.amp,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
    }


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
