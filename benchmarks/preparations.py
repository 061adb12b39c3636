"""What `prepare` is worth before quantizing: `python -m benchmarks.preparations [TEACHER ...]`.

Every teacher of `benchmarks.quality.teachers` is prepared in every way, its decoder linears are quantized in one scheme
each, fitted by E[x²] of the prepared model, untrained, and compared with the teacher: KL in nats per token on the tune
side. Bits per weight are those of the quantized linears, which no preparation changes.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, save

CALIBRATION, SEQUENCES = 64, 16
"""Sequences of the train side that E[x²] is measured on, and of the tune side that KL is."""
SEED = 0
WAYS: dict[str, tuple[bool, bool, float]] = {
    "as it is": (False, False, 0.0),
    "rotate_heads": (False, True, 0.0),
    "rotate_residual": (True, False, 0.0),
    "both rotations": (True, True, 0.0),
    "scale 0.25": (False, False, 0.25),
    "scale 0.5": (False, False, 0.5),
    "both, then scale 0.25": (True, True, 0.25),
}
"""Residual stream rotated, heads rotated, alpha."""
SCHEMES: dict[str, dict[str, Any]] = {
    f"{scheme} {bits}": {"scheme": scheme, "bits": bits}
    for bits in (2, 4)
    for scheme in ("lut_lowrank", "lut", "balanced", "affine")
}


def prepared(folder: Path, way: str, tokens: Any) -> tuple[Any, Any]:
    """The model prepared in one way, and the E[x²] of its linears."""
    from a1q.models.checkpoint import load_model
    from a1q.models.preparations.preparation import prepare_model
    from a1q.models.preparations.rotate_heads import RotateHeads
    from a1q.models.preparations.rotate_residual import RotateResidual
    from a1q.models.preparations.scale import Scale

    residual, heads, alpha = WAYS[way]
    model = load_model(folder)
    rotations = [
        *([RotateResidual(model.config.hidden_size, SEED)] if residual else []),
        *([RotateHeads(SEED)] if heads else []),
    ]
    prepare_model(model, rotations)
    squares = _squares(model, tokens)
    if alpha:
        prepare_model(model, [Scale(squares, alpha)])
        squares = _squares(model, tokens)
    return model, squares


def _squares(model: Any, tokens: Any) -> Any:
    from a1q.quant.calibration import measure_statistics

    with tempfile.TemporaryDirectory() as folder:
        return measure_statistics(model, tokens, Path(folder), batch_size=16, gram=False)


def quantized(model: Any, squares: Any, spec: dict[str, Any]) -> Any:
    """A copy with every decoder linear in one scheme."""
    from a1q.models.dense import write_out
    from a1q.quant.importance import Inputs
    from a1q.quant.linear import QuantLinear
    from a1q.quant.tied import swap_module
    from benchmarks.quality.teachers import linears

    model = copy.deepcopy(model)
    for name, linear in list(linears(model)):
        inputs = Inputs(squares[name].float())
        swap_module(model, name, QuantLinear.quantize(linear, spec, inputs, SEED, keep_latent=False))
    write_out(model)
    return model


def main(teachers: list[str]) -> None:
    """Measure, print a table per teacher, save."""
    from a1q.distill.evaluate import evaluate_model
    from a1q.models.checkpoint import load_model
    from benchmarks.quality.protocol import held_out, seed_tokens
    from benchmarks.quality.teachers import teacher_folder

    rows: list[dict[str, Any]] = []
    for name in teachers:
        folder = teacher_folder(name)
        tune, calibration = held_out(folder, "tune")[:SEQUENCES], seed_tokens(folder, SEED).calibration[:CALIBRATION]
        teacher = load_model(folder)
        for way in WAYS:
            model, squares = prepared(folder, way, calibration)
            kl = {
                scheme: evaluate_model(quantized(model, squares, spec), teacher, tune)["kl"]
                for scheme, spec in SCHEMES.items()
            }
            rows.append({"teacher": name, "preparation": way, "kl": kl})
            print(name, way, kl, file=sys.stderr, flush=True)
            save("preparations", rows)
        table = [[row["preparation"], *(f"{kl:.4f}" for kl in row["kl"].values())] for row in rows]
        print_table(f"{name}: KL by preparation and scheme", ["", *SCHEMES], table[-len(WAYS) :])


if __name__ == "__main__":
    main(sys.argv[1:] or ["pico", "pico-diag", "pico-heavy"])
