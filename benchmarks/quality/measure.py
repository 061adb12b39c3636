"""One cell, run and judged: `python -m benchmarks.quality.measure TEACHER SETTING METHOD SEED [LR]`.

Meant to be a process of its own: then its memory is the method's, and a crash is the cell's alone.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine
from benchmarks.quality.cells import Cell, write_result
from benchmarks.quality.job import Job, peak_bytes
from benchmarks.quality.methods import METHODS
from benchmarks.quality.protocol import SIDES, THREADS, held_out, seed_tokens
from benchmarks.quality.settings import SETTINGS
from benchmarks.quality.teachers import teacher_folder

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_BITS = 16
"""What a parameter that stays as it is costs."""


def measure(cell: Cell) -> dict[str, Any]:
    """Run a cell and judge it on both held-out sides; what a figure that is not finite becomes is None."""
    from a1q.distill.evaluate import evaluate_model
    from a1q.engine.stage import Runtime
    from a1q.models.checkpoint import load_model
    from a1q.training.device import prepare_torch

    prepare_torch(Runtime(threads=THREADS), cell.seed)
    folder = teacher_folder(cell.teacher)
    with tempfile.TemporaryDirectory(prefix="a1q-quality-") as scratch:
        job = Job(folder, SETTINGS[cell.setting], seed_tokens(folder, cell.seed), cell.seed, cell.lr, Path(scratch))
        outcome = METHODS[cell.method].run(job)
    peak = outcome.peak_bytes or peak_bytes()
    teacher, student = load_model(folder), load_model(folder)
    put_weights(student, outcome.weights)
    figures = {side: evaluate_model(student, teacher, held_out(folder, side)) for side in SIDES}
    weights = sum(weight.numel() for weight in outcome.weights.values())
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    found = {
        **{name: {side: figures[side][name] for side in SIDES} for name in ("kl", "top1", "ppl", "teacher_ppl")},
        "bits": outcome.bits,
        "weights": weights,
        "bpw": outcome.bits / weights,
        "bits_per_parameter": (outcome.bits + FLOAT_BITS * (parameters - weights)) / parameters,
        "seconds": dict(outcome.seconds),
        "peak_bytes": peak,
        "facts": dict(outcome.facts),
        "machine": machine(),
    }
    return _finite(found)


def put_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Replace parameters of a dense model in place.

    Raises:
        ValueError: if a name is unknown, or a shape is another.
    """
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name not in parameters or parameters[name].shape != weight.shape:
                raise ValueError(f"the model has no parameter {name} of shape {tuple(weight.shape)}")
            parameters[name].copy_(weight)


def _finite(value: Any) -> Any:
    """`value` with None for numbers that JSON can't hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def main(arguments: list[str]) -> None:
    """Run the cell and write its result."""
    teacher, setting, method, seed, *lr = arguments
    cell = Cell(teacher, setting, method, int(seed), float(lr[0]) if lr else None)
    write_result(cell, measure(cell))


if __name__ == "__main__":
    main(sys.argv[1:])
