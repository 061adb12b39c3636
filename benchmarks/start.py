"""How good the start is: KL of freshly quantized models, untrained. `python -m benchmarks.start [MODEL [SIDE]]`.

Every linear of the model (default `builtin:pico`) is quantized by each method; KL to the model itself is measured on
held-out built-in text, over the full vocabulary. E[x²] comes from the train side. SIDE is `test`, which was looked at
while the fit was being developed, or `tune`, which was not.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, save

TEXT = {"source": "builtin:prose"}
LENGTH, TEST, CALIBRATION = 128, 128, 64
"""Tokens per sequence, sequences of the held-out side at most, sequences of the train side."""
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "k-means, one table per weight": ({"scheme": "lut"}, False),
    "k-means, a table per 16 channels": ({"scheme": "lut", "granularity": "group"}, False),
    "absmax_svd, rank 1": ({"scheme": "lut_lowrank", "fit": "absmax_svd"}, False),
    "als, rank 1, fixed table": ({"scheme": "lut_lowrank", "fit": "als", "lut": "fixed"}, False),
    "als, rank 1": ({"scheme": "lut_lowrank", "fit": "als"}, False),
    "als, rank 1, E[x²]": ({"scheme": "lut_lowrank", "fit": "als"}, True),
    "absmax_svd, rank 3": ({"scheme": "lut_lowrank", "rank": 3, "fit": "absmax_svd"}, False),
    "als, rank 3": ({"scheme": "lut_lowrank", "rank": 3, "fit": "als"}, False),
    "als, rank 3, E[x²]": ({"scheme": "lut_lowrank", "rank": 3, "fit": "als"}, True),
}
LIMIT = 0.6
"""What `als`, weighted by E[x²], may have of the KL of `absmax_svd` at 2 bits and the same rank."""


def quantized(model: Any, spec: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, float]:
    """A copy of `model` with every linear in its layers quantized, and the bits per quantized weight."""
    from torch.nn import Linear

    from a1q.quant.linear import QuantLinear, swap_module

    student = copy.deepcopy(model)
    bits = weights = 0
    for name, module in list(student.named_modules()):
        if isinstance(module, Linear) and ".layers." in name:
            changed = QuantLinear.quantize(module, spec, inputs.get(name), keep_latent=False)
            swap_module(student, name, changed)
            bits += changed.scheme.bits(changed.shape)
            weights += changed.shape[0] * changed.shape[1]
    return student, bits / weights


def main(source: str = "builtin:pico", side: str = "test") -> None:
    """Measure and print."""
    from a1q.data import token_sequences
    from a1q.distill.evaluate import evaluate_model
    from a1q.models.checkpoint import load_model
    from a1q.models.source import resolve_source
    from a1q.quant.calibration import measure_statistics
    from a1q.quant.importance import Inputs

    folder = resolve_source(source, None).path
    model = load_model(folder)
    test = token_sequences(TEXT, folder, side, LENGTH, None, seed=0)[:TEST]
    sample = token_sequences(TEXT, folder, "train", LENGTH, CALIBRATION, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        statistics = measure_statistics(model, sample, Path(scratch), batch_size=8, gram=False)
    inputs = {name: Inputs(square) for name, square in statistics.items()}
    rows: list[dict[str, Any]] = []
    for bits in (2, 4):
        found: dict[str, float] = {}
        for method, (spec, weighted) in METHODS.items():
            start = time.perf_counter()
            student, per_weight = quantized(model, {**spec, "bits": bits}, inputs if weighted else {})
            seconds = time.perf_counter() - start
            figures = evaluate_model(student, model, test)
            found[method] = figures["kl"]
            published = found.get(f"absmax_svd, rank {spec.get('rank', 1)}")
            rows.append(
                {
                    "bits": bits,
                    "method": method,
                    "bpw": round(per_weight, 3),
                    "kl": round(figures["kl"], 5),
                    "of_absmax_svd": round(figures["kl"] / published, 3) if published and "als" in method else None,
                    "ppl": round(figures["ppl"], 3),
                    "teacher_ppl": round(figures["teacher_ppl"], 3),
                    "fit_s": round(seconds, 2),
                }
            )
    save("start" if side == "test" else f"start_{side}", rows)
    print_table(
        f"{source}, {test.size:,} tokens of the {side} side", list(rows[0]), [list(row.values()) for row in rows]
    )
    judged = [row for row in rows if row["bits"] == 2 and row["method"].endswith("E[x²]")]
    worst = max(row["of_absmax_svd"] for row in judged)
    print(f"als with E[x²] at 2 bits has at most {worst:.0%} of the KL of absmax_svd; the limit is {LIMIT:.0%}")
    if worst > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:3])
