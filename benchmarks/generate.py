"""Tokens per second and memory of a quantized model beside the same one dense: `python -m benchmarks.generate`.

The model has Qwen3-0.6B's shapes and random weights: 28 layers, hidden 1024, MLP 3072, a vocabulary of 151,936 whose
embedding is also the head. Its linears are fitted with `--scheme` (JSON) and snapped; the embedding stays fp16. The
same numbers, written out in float32, are the dense model. Both lie in a temporary folder of about 3 GB and are read by
a process of their own each, `transformers` the dense one and `load_compact` the other, where `transformers` generates
greedily on two threads: after a run that isn't counted, the sides take turns, and a side's figure is its median. Memory
is what the weights take, and the process's peak, counted with and without what it was before there was a model.

KL is that of the compact model's next tokens from the dense one's, over random tokens; the embedding is of a size that
makes predictions as sure as a trained model's (`entropy`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, print_table, save

SHAPES = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EMBEDDING = 0.1
"""Standard deviation; logits then have one of about 3."""
SCHEME = {"scheme": "lut_lowrank", "bits": 2}
SIDES = ("dense", "compact")


def make(folder: Path, scheme: dict[str, Any], layers: int, seed: int = 0) -> None:
    """Write `folder/compact`, a snapped model, and `folder/dense`, the same in float32 for transformers."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from a1q.models.checkpoint import save_model, write_config
    from a1q.quant.linear import QuantLinear, swap_module
    from a1q.quant.module import quantized_modules

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPES, "num_hidden_layers": layers}))
    model.model.embed_tokens.weight.data.normal_(0, EMBEDDING)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            made = QuantLinear.quantize(module, scheme, keep_latent=False)
            made.snap()
            swap_module(model, name, made)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.half().float()
    for side in SIDES:
        (folder / side).mkdir()
    save_model(model, folder / "compact")
    weights = {f"{name}.weight": module.dequantize() for name, module in quantized_modules(model)}
    weights |= {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in dict(quantized_modules(model))
    }
    save_file(weights, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    write_config(model.config, folder / "dense", "float32")


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes: `VmHWM`, the peak of resident memory; `VmRSS`, what is resident now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def serve(side: str, folder: Path, prompt: int, tokens: int) -> None:
    """One side's process: load, tell its memory, then generate whenever a line comes in."""
    import torch
    import transformers  # noqa: F401
    from safetensors.torch import save_file

    torch.set_num_threads(2)
    before = memory("VmRSS")
    start = time.perf_counter()
    if side == "dense":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder / side, dtype=torch.float32, attn_implementation="sdpa")
        held = sum(parameter.nbytes for parameter in model.parameters())
    else:
        from a1q.models.compact import load_compact
        from a1q.quant.compact import held_bytes

        model = load_compact(folder / side)
        held = held_bytes(model)
    model.eval()
    loaded = time.perf_counter() - start
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPES["vocab_size"], (1, prompt), generator=generator)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def seconds(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, min_new_tokens=count, max_new_tokens=count, **settings)
        return time.perf_counter() - start

    with torch.inference_mode():
        text = model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **settings)[0, prompt:].tolist()
    facts = {"load_s": loaded, "held": held, "before": before, "text": text}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        first = seconds(1)
        rest = seconds(1 + tokens) - first
        peak = memory("VmHWM")
        figures = {"decode": tokens / rest, "prefill": prompt / first, "peak": peak}
        print(json.dumps(figures), flush=True)
    with torch.inference_mode():
        logits = model(ids).logits[0]
    save_file({"logits": logits}, folder / f"{side}.logits")


def compare(folder: Path) -> dict[str, float]:
    """KL from the dense model's next tokens to the compact one's, nats per position: the mean and the largest."""
    from safetensors.torch import load_file

    dense, compact = (load_file(folder / f"{side}.logits")["logits"].double().log_softmax(-1) for side in SIDES)
    each = (dense.exp() * (dense - compact)).sum(-1)
    return {
        "kl": float(each.mean()),
        "kl_largest": float(each.max()),
        "entropy": float(-(dense.exp() * dense).sum(-1).mean()),
        "top1": float((dense.argmax(-1) == compact.argmax(-1)).double().mean()),
    }


def measure(folder: Path, prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Both sides in turn; medians."""
    processes = {}
    for side in SIDES:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.generate", "--serve", side, str(folder)]
        command += ["--prompt", str(prompt), "--tokens", str(tokens)]
        processes[side] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    facts = {side: _line(process) for side, process in processes.items()}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            found[side].append(_line(process))
    for process in processes.values():
        process.communicate()
    row: dict[str, Any] = {}
    for side in SIDES:
        told = facts[side]
        row[side] = {
            "tokens_per_s": statistics.median(item["decode"] for item in found[side]),
            "prompt_tokens_per_s": statistics.median(item["prefill"] for item in found[side]),
            "weights_bytes": told["held"],
            "peak_bytes": max(item["peak"] for item in found[side]),
            "peak_above_start_bytes": max(item["peak"] for item in found[side]) - told["before"],
            "load_s": told["load_s"],
        }
    row["same_text"] = facts["dense"]["text"] == facts["compact"]["text"]
    return row | compare(folder)


def _line(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{' '.join(map(str, process.args))} ended")  # type: ignore[arg-type]
    return json.loads(line)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scheme", type=json.loads, action="append", help="a scheme as JSON; may be said several times"
    )
    parser.add_argument("--layers", type=int, default=SHAPES["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]), options.prompt, options.tokens)
        return
    rows = []
    for scheme in options.scheme or [SCHEME]:
        with tempfile.TemporaryDirectory(prefix="a1q-generate-") as folder:
            make(Path(folder), scheme, options.layers)
            row = measure(Path(folder), options.prompt, options.tokens, options.rounds)
        rows.append({"scheme": scheme, "layers": options.layers, **row})
        show(rows[-1])
    if options.layers == SHAPES["num_hidden_layers"]:
        print(f"written: {save('generate', rows).relative_to(RESULTS.parent.parent)}")


def show(row: dict[str, Any]) -> None:
    """Print the two sides of a row, and one beside the other."""
    dense, compact = row["dense"], row["compact"]
    lines = [
        [name, f"{dense[key] / unit:,.1f}", f"{compact[key] / unit:,.1f}", f"{100 * compact[key] / dense[key]:.1f} %"]
        for name, key, unit in (
            ("tokens/s", "tokens_per_s", 1),
            ("tokens/s of a prompt", "prompt_tokens_per_s", 1),
            ("weights, MB", "weights_bytes", 1e6),
            ("peak of the process, MB", "peak_bytes", 1e6),
            ("the same above its start, MB", "peak_above_start_bytes", 1e6),
            ("loading, s", "load_s", 1),
        )
    ]
    print_table(json.dumps(row["scheme"]), ["", "dense fp32", "compact", "compact / dense"], lines)
    print(
        f"\nKL {row['kl']:.1e} nats (largest {row['kl_largest']:.1e}), same first choice {100 * row['top1']:.1f} %, "
        f"entropy {row['entropy']:.2f} nats; greedy text {'the same' if row['same_text'] else 'another'}"
    )


if __name__ == "__main__":
    main()
