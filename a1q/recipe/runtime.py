"""Decide what `auto` in `runtime:` means on this machine, without importing torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from a1q.engine.stage import Runtime
from a1q.engine.world import processes_per_machine

BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names in Linux's /proc/cpuinfo: `flags` on x86, `Features` on ARM."""


def resolve_runtime(written: Mapping[str, Any]) -> Runtime:
    """The runtime that a recipe's validated `runtime:` means here.

    The device is told by cheap signs (the NVIDIA driver's device file, an Apple processor); when the run starts,
    torch has the last word and refuses a device that is not there.
    """
    device = _device() if written["device"] == "auto" else written["device"]
    amp = written["amp"]
    if amp == "auto":
        amp = "bf16" if device == "cuda" else "no"
    threads = written["threads"]
    if threads == "auto":
        threads = max(available_threads() // processes_per_machine(), 1)
    return Runtime(device=device, amp=amp, params=written["params"], threads=threads, shard=written["shard"])


def refusal(device: str) -> str:
    """Why this machine certainly lacks a device, or an empty string where only torch can tell."""
    mac = platform.system() == "Darwin"
    if device == "mps" and not mac:
        return "mps is Apple's, and this machine is not a Mac"
    if device == "cuda" and mac:
        return "a Mac has no cuda"
    if device == "cuda" and _torch_without_cuda():
        return "the installed torch is built without cuda"
    return ""


def amp_refusal(runtime: Runtime) -> str:
    """Why a device can't well compute in the type that `amp` says, or an empty string."""
    if runtime.device == "cpu" and runtime.amp == "fp16":
        return "fp16 products on the CPU are slow and overflow"
    return ""


def amp_note(runtime: Runtime) -> str:
    """What to know of an `amp` that is allowed but seldom wanted, or an empty string."""
    if runtime.device == "cpu" and runtime.amp == "bf16" and multiplies_bf16() is False:
        return (
            "this CPU has no bf16 instructions: `amp: bf16` is slower here than `no`, and rounds weights and "
            "activations to 8 significant bits in products"
        )
    return ""


def multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor multiplies bf16 itself, as the kernel's list of its features says; None where none is."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return None
    listed = [
        text for name, _, text in (line.partition(":") for line in lines) if name.strip() in ("flags", "Features")
    ]
    if not listed:
        return None
    return not BF16_FEATURES.isdisjoint(listed[0].split())


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device() -> str:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "mps"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if Path("/dev/nvidia0").exists() and not hidden and not _torch_without_cuda():
        return "cuda"
    return "cpu"


def _torch_without_cuda() -> bool:
    try:
        return "+cpu" in version("torch")
    except PackageNotFoundError:
        return True
