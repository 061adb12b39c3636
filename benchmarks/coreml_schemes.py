"""Every scheme as Core ML stores it: `python -m benchmarks.coreml_schemes`.

One decoder layer at real shapes (hidden 1024, MLP 3072), every projection in one scheme, exported; size against theory,
numbers read back against the model's, and whether `infer` and `prefill` share one copy. Exits 1 if a limit is missed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from a1q.coreml.accounting import account_bundle
from a1q.coreml.bundle import read_bundle
from a1q.coreml.stored import unequal
from a1q.coreml.weights import decoder_weights
from a1q.engine.artifact import Artifact
from a1q.engine.stage import StageContext
from a1q.exporters.coreml import CoremlConfig, CoremlExporter
from benchmarks.common import print_table, save

LUTS: list[dict[str, Any]] = [{"scheme": "lut", "bits": bits} for bits in (1, 2, 3, 4, 6, 8)]
GROUPED: list[dict[str, Any]] = [
    {"scheme": "lut", "bits": 2, "granularity": "group", "channels": 64},
    {"scheme": "lut", "bits": 4, "granularity": "group", "channels": 16},
    {"scheme": "lut", "bits": 2, "granularity": "channel"},
]
SCALED: list[dict[str, Any]] = [
    {"scheme": "lut_lowrank", "bits": bits, "rank": rank, "fit": "absmax_svd"} for bits in (2, 4) for rank in (1, 8, 32)
]
EVEN: list[dict[str, Any]] = [
    {"scheme": "balanced", "bits": 2},
    {"scheme": "balanced", "bits": 4, "granularity": "channel"},
    {"scheme": "affine", "bits": 8},
    {"scheme": "affine", "bits": 4},
    {"scheme": "affine", "bits": 8, "symmetric": False},
    {"scheme": "affine", "bits": 4, "symmetric": False, "granularity": "group", "group_size": 32},
]
TOLERANCE = 0.01


def measure(spec: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """Export one layer in one scheme (None: fp16) and read it back."""
    model = _model(spec)
    source, out, scratch = folder / "model", folder / "out", folder / "scratch"
    for path in (source, out, scratch):
        path.mkdir(parents=True)
    from a1q.models.checkpoint import save_model

    save_model(model, source)
    ctx = StageContext(id="coreml", config=None, seed=0, inputs={}, out=out, scratch=scratch)
    config = CoremlConfig("single", 128, 32, None, None, None, "inside", {}, 1.0, None)
    CoremlExporter().export(Artifact("model", source, "benchmark"), config, ctx)
    bundle = read_bundle(out)
    report = account_bundle(bundle)
    part = report.parts["model"]
    return {
        "scheme": "fp16" if spec is None else " ".join(f"{value}" for key, value in spec.items() if key != "fit"),
        "weight_bytes": part.weight_bytes,
        "theory_bytes": part.theory_bytes,
        "ratio": part.size_ratio,
        "bits_per_weight": part.bits_per_weight,
        "different_numbers": sum(unequal(bundle, decoder_weights(model))[0].values()),
        "stored_twice": report.wasted_bytes,
        "operations": part.functions["infer"].operations.get("conv", 0),
        "multiply_adds_ratio": report.multiply_adds_ratio,
    }


def _model(spec: dict[str, Any] | None) -> Any:
    """A snapped Qwen3 of one layer of random weights."""
    import torch
    from torch import nn
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from a1q.quant.linear import QuantLinear
    from a1q.quant.tied import swap_module

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=1024, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    for name, module in list(model.named_modules()):
        if spec is not None and isinstance(module, nn.Linear) and name != "lm_head":
            quantized = QuantLinear.quantize(module, spec, keep_latent=False)
            quantized.snap()
            swap_module(model, name, quantized)
    return model


def main() -> None:
    """Measure all, print, save, and say what is missed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, spec in enumerate([None, *LUTS, *GROUPED, *SCALED, *EVEN]):
            rows.append(measure(spec, Path(folder, str(number))))
    save("coreml_schemes", rows)
    header = list(rows[0])
    cells = [[f"{row[name]:.5g}" if isinstance(row[name], float) else row[name] for name in header] for row in rows]
    print_table("One layer of Qwen3-0.6B's shapes as Core ML stores it", header, cells)
    missed = [row["scheme"] for row in rows if abs(row["ratio"] - 1) > TOLERANCE or row["different_numbers"]]
    for name in missed:
        print(f"missed: {name}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
