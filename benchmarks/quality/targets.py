"""The figures to reach, as data: what is measured, against whom, and how many bits it may cost."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.cells import Row

LAYER_SECONDS, LAYER_GIB = 90.0, 3.0
"""For the fit of one layer of Qwen3-0.6B's shape at rank 8 (`layer.py`)."""
REFERENCE = {
    "w2": "peer:autoround",
    "w2-200": "seq",
    "w2a4": "peer:autoround",
    "w2a4-200": "peer:autoround",
    "w3": "peer:autoround",
    "w4": "peer:gptq",
    "whole": "peer:autoround",
}
"""Whom a setting's rows are compared with."""
UNTRAINED = {"w2a4-200": "w2a4", "whole": "w2"}
"""Where the reference stands in another setting, as it does not train or keeps the embedding."""


@dataclass(frozen=True)
class Target:
    """`ours` has at most `factor` times the figure of `reference`, at no more than the bits allowed."""

    name: str
    ours: Row
    factor: float
    reference: Row
    figure: str = "kl"
    """`kl` on the test side, or `fit`: seconds."""
    bpw: float | None = None
    bits_per_parameter: float | None = None
    stretch: bool = False
    """Beyond what any prototype had reached."""


def reference_row(teacher: str, setting: str) -> Row:
    """Whom the rows of a setting are compared with."""
    return Row(teacher, UNTRAINED.get(setting, setting), REFERENCE[setting])


def _pico(setting: str, method: str) -> Row:
    return Row("pico", setting, method)


TARGETS = (
    Target("2 bit, rank 1, untrained", _pico("w2", "a1q"), 0.85, _pico("w2", "peer:autoround"), bpw=2.10, stretch=True),
    Target("2 bit, untrained", _pico("w2", "a1q-budget"), 0.70, _pico("w2", "peer:autoround"), bpw=2.25, stretch=True),
    Target("2 bit, rank 1, 200 steps", _pico("w2-200", "a1q"), 0.80, _pico("w2-200", "seq"), bpw=2.10, stretch=True),
    Target("2 bit, 200 steps", _pico("w2-200", "a1q-budget"), 0.70, _pico("w2-200", "seq"), bpw=2.25, stretch=True),
    Target(
        "2-bit MLP, 4-bit attention, 200 steps",
        _pico("w2a4-200", "a1q"),
        0.35,
        _pico("w2a4", "peer:autoround"),
        bpw=2.75,
        stretch=True,
    ),
    Target("4 bit, rank 1, untrained", _pico("w4", "a1q"), 0.85, _pico("w4", "peer:gptq"), bpw=4.11),
    Target("3 bit, untrained", _pico("w3", "a1q"), 0.80, _pico("w3", "peer:autoround"), bpw=3.25, stretch=True),
    Target(
        "whole model, 200 steps",
        _pico("whole", "a1q"),
        1.0,
        _pico("w2", "peer:autoround"),
        bits_per_parameter=2.6,
        stretch=True,
    ),
    Target(
        "pico-heavy, 2 bit, rank 1, untrained",
        Row("pico-heavy", "w2", "a1q"),
        1.0,
        Row("pico-heavy", "w2", "peer:autoround"),
        bpw=2.10,
    ),
    Target("pico-diag, 2 bit, untrained", Row("pico-diag", "w2", "a1q"), 1.3, _pico("w2", "a1q")),
    Target("fit time, all linears of pico", _pico("w2", "a1q"), 1.0, _pico("w2", "peer:autoround"), figure="fit"),
)
