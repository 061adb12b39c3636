"""What settings of drawing may be, on the command line and within a chat."""

from __future__ import annotations

RANGES: dict[str, tuple[type[int] | type[float], float, float]] = {
    "temperature": (float, 0, 100),
    "top_p": (float, 1e-6, 1),
    "top_k": (int, 0, 1 << 30),
    "repetition_penalty": (float, 0.01, 100),
    "max_tokens": (int, 1, 1 << 30),
    "seed": (int, 0, (1 << 63) - 1),
}
"""Setting -> its type, the least and the most."""


def shown(value: float) -> str:
    """A setting for people."""
    return str(value) if isinstance(value, int) else f"{value:g}"
