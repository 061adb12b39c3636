"""Memory that training takes, and what to say when there is not enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from a1q.errors import StageError

SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def peak_memory(device: str) -> int:
    """Bytes that this process has held at most, on the device or, on the CPU, altogether."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def told_what_to_lower(
    sequences: int, accumulate: int, length: int, else_: str, recompute: bool | None = None
) -> Iterator[None]:
    """Say which three options to lower, and by how much, where memory runs out inside.

    Args:
        sequences: `batch.sequences`.
        accumulate: `batch.accumulate`.
        length: tokens of a sequence.
        else_: what else to change, where one of the other three says nothing.
        recompute: that option; None where a stage has none.

    Raises:
        StageError: in place of the library's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in SIGNS):
            raise
        raise StageError(f"out of memory; {_remedy(sequences, accumulate, length, else_, recompute)}") from error


def _remedy(sequences: int, accumulate: int, length: int, else_: str, recompute: bool | None) -> str:
    ways = []
    if sequences > 1:
        half = sequences // 2
        same = -(-sequences * accumulate // half)
        ways.append(
            f"`batch.sequences` from {sequences} to {half} (with `batch.accumulate` from {accumulate} to {same} a step "
            "stays what it is)"
        )
    if recompute is False:
        ways.append("`recompute` from false to true, which keeps one layer's activations instead of all")
    ways.append(f"the data's `seq_len` from {length} to {max(length // 2, 1)}")
    if len(ways) < 3:
        ways.append(else_)
    return "change one of these: " + "; ".join(ways)
