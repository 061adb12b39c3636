"""What training through the quantizer costs: `python -m benchmarks.training.pico [ROUNDS [THREADS]]`.

Tokens per second of a plain forward and backward pass of the dense model, and of whole training steps (teacher cache
read, forward, loss, backward, AdamW) of the same model dense and quantized, in turns so that a busy machine slows all
alike. The ratio is of processor time, which other programs disturb least, with one thread above all. The model has the
built-in one's shape and random weights.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from a1q.distill.cache import DESCRIPTION, TeacherCache
from a1q.engine.stage import Runtime, StageContext
from a1q.quant.linear import QuantLinear, quantized_modules, swap_module
from a1q.training.adapters import attach_adapters
from a1q.training.device import prepare_torch
from a1q.training.distillation import BatchConfig, Distillation, Objective
from a1q.training.loop import LoopSpec, run_loop
from a1q.training.parameters import parameter_groups, set_aside_latents
from benchmarks.common import print_table, save
from benchmarks.kd_cache import LENGTH, NEGATIVES, TOP_K, VOCABULARY, build_model, write

SEQUENCES, STEPS = 16, 2
PLAIN = "plain forward and backward"
RATES = {"weights": 1e-4, "scales": 1e-3, "lut": 1e-3}


def quantized(model: Any) -> Any:
    """A copy with 2-bit MLPs and 4-bit attention, as in the demo recipe."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        bits = 2 if ".mlp." in name else 4
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            quick = {"scheme": "lut_lowrank", "bits": bits, "rank": 1, "rounds": 1}
            swap_module(model, name, QuantLinear.quantize(module, quick))
    for _, module in quantized_modules(model):
        module.straight_through_fp16 = True
    return model


class Variant:
    """One way to train, measured by `measure` a few steps at a time."""

    def __init__(self, model: Any, groups: list[dict[str, Any]], state: dict[str, torch.Tensor], cache: TeacherCache):
        self.groups, self.state = groups, state
        objective = Objective("teacher", 1.0, 0.1, 0.0, "negatives", False, 0.0, 1.0, "all")
        self.objective = Distillation(model, cache, objective, BatchConfig(SEQUENCES, 1), Runtime(), 0, 1)

    def measure(self, ctx: StageContext) -> float:
        """Tokens per second of a few steps."""
        spec = LoopSpec(steps=STEPS, seed=1, keep="last", checkpoint_seconds=float("inf"))
        result = run_loop(
            ctx,
            parameter_groups=self.groups,
            loss_of=self.objective.loss_of,
            evaluate=None,
            spec=spec,
            state=self.state,
            identity={},
        )
        return result.tokens_per_second


def variants(dense: Any, cache: TeacherCache) -> dict[str, Variant]:
    """Every way to train that is compared."""
    found = {}
    model = copy.deepcopy(dense)
    model.requires_grad_(False)
    state = {name: item for name, item in model.named_parameters() if "proj" in name}
    for item in state.values():
        item.requires_grad_(True)
    groups = [{"name": "weights", "params": list(state.values()), "lr": 1e-4}]
    found["dense, all linears"] = Variant(model, groups, state, cache)
    for sets in (("weights", "scales", "lut"), ("scales", "lut")):
        model = quantized(dense)
        modules = dict(quantized_modules(model))
        if "weights" not in sets:
            set_aside_latents(modules)
        found["train " + ", ".join(sets)] = Variant(
            model, *parameter_groups(model, modules.values(), sets, RATES), cache
        )
    model = quantized(dense)
    modules = dict(quantized_modules(model))
    set_aside_latents(modules)
    wrapped = attach_adapters(model, [name for name in modules if ".mlp." in name], 4, 4.0, 0.0)
    state = {name: item for name, item in wrapped.named_parameters() if item.requires_grad}
    found["lora_recover, rank 4 on MLPs"] = Variant(
        model, [{"name": "adapters", "params": list(state.values()), "lr": 1e-3}], state, cache
    )
    return found


def plain(model: Any, tokens: torch.Tensor) -> float:
    """Tokens per second of forward, cross-entropy and backward of the dense model."""
    began = time.perf_counter()
    for _ in range(STEPS):
        logits = model(input_ids=tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)
    return STEPS * tokens.numel() / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    prepare_torch(Runtime(threads=threads), 0)
    dense = build_model()
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(8 * SEQUENCES, LENGTH)).astype(np.int32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(dense, tokens, folder / "teacher")
        description = folder / "teacher" / DESCRIPTION
        sizes = {"top_k": TOP_K, "random_negatives": NEGATIVES}
        description.write_text(json.dumps({**json.loads(description.read_text()), **sizes}))
        ways = variants(dense, TeacherCache(folder / "teacher"))
        ctx = StageContext("bench", None, 0, {}, folder, folder / "scratch", Runtime(threads=threads))
        speeds: dict[str, list[float]] = {PLAIN: [], **{way: [] for way in ways}}
        batch = torch.from_numpy(tokens[:SEQUENCES]).long()
        cpu: dict[str, list[float]] = {way: [] for way in speeds}
        for _ in range(rounds + 1):  # the first warms up
            for way in speeds:
                began = time.process_time()
                speeds[way].append(plain(dense, batch) if way == PLAIN else ways[way].measure(ctx))
                cpu[way].append((time.process_time() - began) / STEPS)
    base = statistics.median(cpu[PLAIN][1:])
    rows = []
    for way in speeds:
        seconds = statistics.median(cpu[way][1:])
        speed = round(statistics.median(speeds[way][1:]))
        ratio = round(seconds / base, 2)
        rows.append({"what": way, "tokens_per_s": speed, "cpu_s_per_step": round(seconds, 3), "cpu_ratio": ratio})
    save("training_pico", {"threads": threads, "batch": [SEQUENCES, LENGTH], "rounds": rounds, "speeds": rows})
    title = (
        f"Training steps of {SEQUENCES} x {LENGTH} tokens, {threads} threads; processor time against the plain passes"
    )
    print_table(title, list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
