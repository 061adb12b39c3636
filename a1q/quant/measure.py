"""What the quantizing stages report of their own work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from a1q.quant.bits import bpw, bpw_model

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.importance import Inputs

LAYER = re.compile(r"\.layers\.(\d+)\.")
"""Where a module's name says which decoder layer it is in."""


def relative_error(weight: Tensor, approximation: Tensor, inputs: Inputs | None) -> tuple[float, float]:
    """(E|(W - Ŵ) x|², E|W x|²) in float64, as far as `inputs` are known: E[x xᵀ], else E[x²], else all alike."""
    weight, approximation = weight.cpu().double(), approximation.cpu().double()
    difference = weight - approximation
    if inputs is not None and inputs.gram is not None:
        gram = inputs.gram.cpu().double()
        return float(((difference @ gram) * difference).sum()), float(((weight @ gram) * weight).sum())
    wrong, whole = difference.square(), weight.square()
    if inputs is not None:
        h = inputs.square.cpu().double()
        wrong, whole = wrong * h, whole * h
    return float(wrong.sum()), float(whole.sum())


def error_by_group(items: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Group -> Σ of the errors / Σ of the wholes, from (group, error, whole) of every module."""
    sums: dict[str, list[float]] = {}
    for group, wrong, whole in items:
        total = sums.setdefault(group, [0.0, 0.0])
        total[0] += wrong
        total[1] += whole
    return {group: wrong / whole if whole else 0.0 for group, (wrong, whole) in sums.items()}


def error_by_layer(errors: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Number of the decoder layer -> Σ of the errors / Σ of the wholes, from (error, whole) by module name.

    Modules outside of layers are left out.
    """
    layers = ((LAYER.search(name), error) for name, error in errors.items())
    return error_by_group((found[1], *error) for found, error in layers if found)


def report_bits(folder: Path) -> dict[str, float]:
    """`bpw` and `bpw_model` of the model in `folder`."""
    from a1q.models.view import read_view

    view = read_view(folder)
    return {"bpw": bpw(view), "bpw_model": bpw_model(view)}
