"""Memory that is used again: for what is made on the way to a product and forgotten at once.

An allocator that gives such matrices out between tensors that live until the backward pass leaves holes where they
were: training took 1.4 times the memory, and asking the system for fresh pages took as long as filling them. Devices
other than the CPU bring an allocator that knows better.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 1 << 26
"""Bytes of a tensor that is kept; larger ones are made anew."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_KEPT = _Kept()


def workspace(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to write into. It holds anything, and is whoever's who asks next for that `name` in this thread."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size > LARGEST or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    kept = _KEPT.buffers.get(name)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):
            kept = _KEPT.buffers[name] = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype).view(*shape)
