"""Time and memory of the fit of one layer of Qwen3-0.6B's shape at rank 8: `python -m benchmarks.quality.layer`.

Seven linears of random weights, on inputs with correlated channels and an uneven spectrum, as E[x xᵀ] of real ones has:
it decides how long an exact solve takes. Calibration runs before, and is timed apart.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.quality.configurations import CONFIGURATIONS
from benchmarks.quality.job import peak_bytes
from benchmarks.quality.protocol import CALIBRATION, LENGTH
from benchmarks.quality.table import LAYER
from benchmarks.quality.teachers import linears

NAME = "layer"
BITS, RANK = 2, 8
CORES = 2
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}


def specs() -> dict[str, dict[str, Any]]:
    """a1q's configuration at 2 bits, at this rank."""
    patterns = CONFIGURATIONS["a1q"].specs[BITS]
    return {pattern: {**spec, "bits": BITS, "rank": RANK} for pattern, spec in patterns.items()}


def key() -> dict[str, Any]:
    """What the figures hang on, beside the machine."""
    from a1q.engine.registry import active_registry
    from a1q.quant.build import complete

    filled = {pattern: complete(spec) for pattern, spec in specs().items()}
    versions = {spec["scheme"]: active_registry().get("schemes", spec["scheme"]).version for spec in filled.values()}
    return json.loads(json.dumps({"specs": filled, "schemes": versions, "shape": SHAPE}))


def known() -> dict[str, Any] | None:
    """The figures on disk, if they are of today's configuration."""
    try:
        found = json.loads(LAYER.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("key") == key() else None


def build(shape: dict[str, Any]) -> Any:
    """A decoder of one layer, seeded; its inputs have variances from 1 down to 1/1000 in random directions."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    hidden = shape["hidden_size"]
    directions = torch.linalg.qr(torch.randn(hidden, hidden)).Q
    sizes = torch.logspace(0, -1.5, hidden)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(shape["vocab_size"], hidden) * sizes @ directions)
    return model


def measure(shape: dict[str, Any], sequences: int) -> dict[str, Any]:
    """Calibrate, fit, and count."""
    from fnmatch import fnmatchcase

    import numpy

    from a1q.engine.stage import Runtime
    from a1q.quant.calibration import measure_statistics
    from a1q.quant.linear import QuantLinear
    from a1q.quant.statistics import Statistics
    from a1q.training.device import prepare_torch

    prepare_torch(Runtime(threads=CORES), 0)
    model = build(shape)
    tokens = numpy.random.default_rng(0).integers(shape["vocab_size"], size=(sequences, LENGTH))
    with tempfile.TemporaryDirectory(prefix="a1q-layer-") as scratch:
        began = time.perf_counter()
        measure_statistics(model, tokens, Path(scratch), batch_size=8)
        calibration = time.perf_counter() - began
        statistics = Statistics(Path(scratch))
        began, each = time.perf_counter(), {}
        for name, dense in list(linears(model)):
            spec = next(spec for pattern, spec in specs().items() if fnmatchcase(name, pattern))
            start = time.perf_counter()
            QuantLinear.quantize(dense, spec, statistics.inputs(name), 0, keep_latent=False)
            each[name] = time.perf_counter() - start
        seconds = time.perf_counter() - began
    return {
        "key": key(),
        "seconds": seconds,
        "seconds_each": each,
        "calibration_seconds": calibration,
        "peak_bytes": peak_bytes(),
        "machine": machine(),
    }


def main() -> None:
    """Measure and write."""
    from a1q.engine.files import write_atomic

    found = measure(SHAPE, CALIBRATION)
    LAYER.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(LAYER, json.dumps(found, indent=2) + "\n")
    print(f"{found['seconds']:.1f} s, {found['peak_bytes'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
