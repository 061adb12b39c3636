"""Every training stage at full size: `python -m benchmarks.training.real [LAYERS]`.

A Qwen3-0.6B of random weights goes through `a1q run` in a process of its own: teacher cache, quantization to Q2A4,
scales alone, weights with scales and tables (with and without layers computed again), LoRA recovery. Seconds of a step
and the process's peak memory so far are what the stages themselves tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from a1q.models.source import resolve_source
from benchmarks.common import print_table, save
from benchmarks.training.shapes import LAYERS, QWEN3

RECIPE = """\
a1q: 1
name: real
seed: 1
model: {{source: {model}}}
data: {{text: {{source: "builtin:prose", seq_len: 128}}}}
groups:
  mlp: {{match: 'model\\.layers\\.\\d+\\.mlp\\.(gate|up|down)_proj'}}
  attn: {{match: 'model\\.layers\\.\\d+\\.self_attn\\.[qkvo]_proj'}}
stages:
  - id: teacher
    kd: {{data: text, batch: 4, cache: {{top_k: 128, random_negatives: 128, sequences: 12, tune_sequences: 4}}}}
  - id: q2a4
    quantize:
      rules:
        mlp: {{scheme: lut_lowrank, bits: 2, fit: absmax_svd}}
        attn: {{scheme: lut_lowrank, bits: 4, fit: absmax_svd}}
      rest: keep
  - id: scales
    train: {{objective: {{kd: teacher}}, steps: 2, batch: {{sequences: 4}}, trainable: [scales]}}
  - id: adapters
    lora_recover: {{objective: {{kd: teacher}}, steps: 2, rank: 8, batch: {{sequences: 4}}, merge: adapter}}
  - id: weights_again
    from: q2a4
    train: {{objective: {{kd: teacher}}, steps: 2, batch: {{sequences: 4}}, recompute: true}}
  - id: weights
    from: q2a4
    train: {{objective: {{kd: teacher}}, steps: 2, batch: {{sequences: 4}}}}
"""


def write_model(folder: Path, layers: int) -> None:
    """A Qwen3 of random weights, with the built-in model's tokenizer: its ids are among the larger vocabulary's."""
    import shutil

    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, **QWEN3))
    model.save_pretrained(folder)
    pico = resolve_source("builtin:pico", None).path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(pico / name, folder / name)


def main(layers: int) -> None:
    """Write, run and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", layers)
        (folder / "real.yaml").write_text(RECIPE.format(model=folder / "model"))
        command = [sys.executable, "-m", "a1q", "run", str(folder / "real.yaml"), "-o", str(folder / "run")]
        subprocess.run(command, check=True, env={**os.environ, "A1Q_HOME": str(folder / "home")}, stdout=sys.stderr)
        report = json.loads((folder / "run" / "report.json").read_text())
        rows: list[dict[str, Any]] = []
        for stage in report["stages"]:
            curve = folder / "run" / "metrics" / f"{stage['id']}.jsonl"
            lines = [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []
            peaks = [line["memory_bytes"] for line in lines if "memory_bytes" in line]
            speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
            rows.append(
                {
                    "stage": stage["id"],
                    "type": stage["stage"],
                    "seconds": stage["seconds"],
                    "s per step": round(4 * 128 / speeds[-1], 1) if speeds else "",
                    "peak GiB of the run so far": round(max(peaks) / 2**30, 2) if peaks else "",
                    "KL before": round(stage["metrics"].get("kl_before", 0), 4) or "",
                    "KL after": round(stage["metrics"].get("kl_after", stage["metrics"].get("kl_adapter", 0)), 4) or "",
                }
            )
    save("training_real", {"layers": layers, "stages": rows})
    print_table(f"Qwen3-0.6B's shape, {layers} layers", list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else LAYERS)
