"""What exporting a full-size model costs: `python -m benchmarks.coreml_size [LAYERS]`.

A Qwen3-0.6B of random snapped weights (MLP 2 bit, attention 4 bit, embedding and tied head 4 bit) is exported by
`a1q run` in a process of its own, which reads the package back and compares it with PyTorch over a prompt and 8 more
tokens. Done for rank 1 and for rank 32 (MLP) with 8 (attention); exits 1 if a limit is missed. LAYERS is for trying it
out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table, save

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS = 151936, 1024, 3072, 28
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
WEIGHT_STD = 0.02
"""Of a freshly initialised Qwen3."""
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "eos_token_id": 151645,
    "dtype": "float16",
}
ATTENTION = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
}
MLP = {
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = {
    "input_layernorm": HIDDEN,
    "post_attention_layernorm": HIDDEN,
    "self_attn.q_norm": HEAD_DIM,
    "self_attn.k_norm": HEAD_DIM,
}
EMBEDDING = "model.embed_tokens"
VARIANTS = {"1": (1, 1, 2.85, 3.2), "32/8": (32, 8, 3.32, None)}
"""Name -> rank of MLP and attention, most bits per weight of the layers, most bits per parameter of the whole."""
MAX_SECONDS, MAX_GIB = 240, 6
RECIPE = """
a1q: 1
name: coreml-size
model: {{source: {model}}}
stages:
  - export:
      {{format: coreml, layout: single, context: 512, prefill: 64, verify: {{prompt: 16, generate: 8, random: 0}}}}
"""


def write_model(folder: Path, layers: int, mlp_rank: int, attention_rank: int) -> None:
    """Write a snapped model artifact of random indices, tables and scales."""
    from safetensors.numpy import save_file

    from a1q.quant.build import complete

    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, Any] = {}

    def quantized(name: str, shape: tuple[int, int], bits: int, rank: int) -> None:
        rows, columns = shape
        levels = np.sort(rng.uniform(0.2, 1.6, 2 ** (bits - 1)))
        table = np.concatenate([-levels[::-1], levels])
        size = (WEIGHT_STD / table.std() / rank**0.5) ** 0.5
        # One rank: positive scales, as fits give. More: terms of either sign, as many as add up to the same size.
        factors = (rng.uniform(0.5, 1.5, (n, 1)) if rank == 1 else rng.standard_normal((n, rank)) for n in shape)
        a, b = (size * factor for factor in factors)
        tensors[f"{name}.indices"] = rng.integers(0, 256, rows * columns * bits // 8, np.uint8)
        tensors.update({f"{name}.{part}": value.astype(np.float16) for part, value in (("lut", table), ("a", a))})
        tensors[f"{name}.b"] = np.ascontiguousarray(b.T).astype(np.float16)
        spec = complete({"scheme": "lut_lowrank", "bits": bits, "rank": rank})
        kind = "embedding" if name == EMBEDDING else "linear"
        facts = {"kind": kind, "state": "snapped", "scheme": spec, "shape": [*shape], "adapter": None, "fp16": False}
        modules[name] = facts

    quantized(EMBEDDING, (VOCABULARY, HIDDEN), 4, 1)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for shapes, bits, rank in ((ATTENTION, 4, attention_rank), (MLP, 2, mlp_rank)):
            for name, shape in shapes.items():
                quantized(f"{prefix}.{name}", shape, bits, rank)
        tensors.update({f"{prefix}.{name}.weight": np.ones(size, np.float16) for name, size in NORMS.items()})
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float16)
    header = json.dumps({"format": 1, "modules": modules}, sort_keys=True)
    save_file(tensors, folder / "model.safetensors", metadata={"a1q": header})
    config = {**CONFIG, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def a1q(*arguments: str, home: Path) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak memory in GiB of one command, in a fresh process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "a1q", *arguments], env={**os.environ, "A1Q_HOME": str(home)}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a1q {' '.join(arguments)} failed with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 2**30


def layer_bits(package: Path, layers: int) -> float:
    """Bits per weight of the layers in a weight file: all of it but the embedding's tables and scales."""
    from a1q.coreml.package import WEIGHTS
    from a1q.coreml.weightfile import blobs, read_spec

    table = {blob.offset: blob.bits for blob in blobs(read_spec(package)) if blob.operation.startswith("embedding_")}
    size = (package / WEIGHTS).stat().st_size
    weights = layers * sum(rows * columns for rows, columns in [*ATTENTION.values(), *MLP.values()])
    return (8 * size - sum(table.values())) / weights


def measure(name: str, layers: int) -> dict[str, Any]:
    """Make, plan and export one variant."""
    mlp_rank, attention_rank, most_layers, most_whole = VARIANTS[name]
    with tempfile.TemporaryDirectory() as place:
        model, recipe, home = Path(place, "model"), Path(place, "recipe.yaml"), Path(place, "home")
        model.mkdir()
        write_model(model, layers, mlp_rank, attention_rank)
        recipe.write_text(RECIPE.format(model=model), encoding="utf-8")
        plan_seconds, *_ = a1q("plan", str(recipe), home=home)
        seconds, processor, gib = a1q("run", str(recipe), "-o", str(Path(place, "out")), home=home)
        (stage,) = json.loads(Path(place, "out", "report.json").read_text())["stages"]
        metrics = stage["metrics"]
        bits = layer_bits(Path(stage["artifact"], "model.mlpackage"), layers)
    return {
        "rank": name,
        "layers": layers,
        "plan_seconds": plan_seconds,
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_gib": gib,
        "layer_bits": bits,
        "layer_bits_limit": most_layers,
        "bits": metrics["bits_per_parameter"],
        "bits_limit": most_whole,
        "metrics": metrics,
    }


def missed(row: dict[str, Any]) -> list[str]:
    """What of one variant is beyond its limit."""
    limits = {
        "seconds": MAX_SECONDS,
        "peak_gib": MAX_GIB,
        "layer_bits": row["layer_bits_limit"],
        "bits": row["bits_limit"],
    }
    return [
        f"rank {row['rank']}: {name} {row[name]:.4g}, wanted {limit}"
        for name, limit in limits.items()
        if limit is not None and row[name] > limit
    ]


def main() -> None:
    """Measure, print, compare."""
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else LAYERS
    rows = []
    for name in VARIANTS:
        rows.append(measure(name, layers))
        print({key: value for key, value in rows[-1].items() if key != "metrics"}, file=sys.stderr)
    if layers == LAYERS:
        save("coreml_size", rows)
    sizes = ["plan_seconds", "seconds", "processor_seconds", "peak_gib", "layer_bits", "bits"]
    print_table(
        f"Qwen3-0.6B ({layers} layers) through `a1q run`, verified",
        ["rank", *sizes],
        [[row["rank"], *(f"{row[name]:.4g}" for name in sizes)] for row in rows],
    )
    figures = ["positions", "cosine", "relative_error", "kl", "agreement", "greedy_agreement", "overflows"]
    print_table(
        "The packages, interpreted, against PyTorch",
        ["rank", "precision", *figures],
        [
            [row["rank"], precision, *(f"{row['metrics'][f'{name}_{precision}']:.9g}" for name in figures)]
            for row in rows
            for precision in ("fp32", "fp16")
        ],
    )
    failures = [text for row in rows for text in missed(row)]
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
