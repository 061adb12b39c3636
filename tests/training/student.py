"""A tiny quantized student and its teacher's cache, and contexts for the stages that train.

`python -m tests.training.student FOLDER STAGE LOOP STEP` runs a stage on them and dies at that step of the loop LOOP.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from a1q.engine.artifact import Artifact
from a1q.engine.config import build_config
from a1q.engine.registry import Registry
from a1q.engine.stage import Group, Runtime, StageContext
from a1q.models.checkpoint import load_model, save_model
from a1q.quant.linear import QuantLinear, swap_module
from a1q.recipe.schema import Checker
from tests.tiny import tiny_folder, tiny_model

MLP = r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
ATTENTION = r"model\.layers\.\d+\.self_attn\.[qkvo]_proj"
GROUPS = {"mlp": Group("mlp", MLP, 6), "attn": Group("attn", ATTENTION, 8), "head": Group("head", "model.embed_tokens")}
SPEC = {"scheme": "lut_lowrank", "bits": 2, "rank": 1}
SEQUENCES, TUNE, LENGTH = 96, 12, 16


def build(
    folder: Path,
    latent: bool = True,
    spec: Mapping[str, Any] = SPEC,
    top_k: int = 32,
    random_negatives: int = 32,
    tune: int = TUNE,
) -> dict[str, Artifact]:
    """Write a 2-bit tiny model and a cache of the dense one's answers; the inputs of a stage that trains."""
    from a1q.distill.cache import DESCRIPTION, FORMAT
    from a1q.distill.teacher import write_shards
    from a1q.distill.tokenizers import tokenizer_digest

    dense, quantized, teacher = folder / "dense", folder / "quantized", folder / "teacher"
    tiny_folder(dense)
    model = load_model(dense)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and (".mlp." in name or ".self_attn." in name):
            swap_module(model, name, QuantLinear.quantize(module, spec, keep_latent=latent))
    quantized.mkdir()
    save_model(model, quantized, tokenizer_from=dense)
    tokens = np.random.default_rng(3).integers(320, size=(SEQUENCES + tune, LENGTH))
    parts = {"train": tokens[:SEQUENCES], "tune": tokens[SEQUENCES:]}
    names = write_shards(
        tiny_model(),
        parts,
        starts={part: rows % 7 == 0 for part, rows in parts.items()},
        folder=teacher,
        top_k=top_k,
        random_negatives=random_negatives,
        shard_sequences=16,
        batch=8,
        seed=1,
    )
    description = {
        "format": FORMAT,
        "vocabulary": 320,
        "seq_len": LENGTH,
        "top_k": top_k,
        "random_negatives": random_negatives,
        "shard_sequences": 16,
        "tokenizer": tokenizer_digest(dense),
        "chat_template": None,
        "parts": {part: {"sequences": len(parts[part]), "shards": names[part]} for part in parts},
    }
    (teacher / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    known = {"teacher": {"source": str(dense), "revision": None, "digest": "d" * 64}}
    return {
        "model": Artifact("model", quantized, "m" * 64),
        "teacher": Artifact("teacher", teacher, "t" * 64, known),
        "teacher_model": Artifact("model", dense, "d" * 64),
    }


def stage_config(stage: str, options: Mapping[str, Any]) -> Any:
    """The typed config of `options`, checked against the shipped schema and filled with its defaults."""
    registry = Registry()
    checker, schema = Checker(registry), registry.schema("stages", stage)
    findings = checker.check(schema, options)
    assert not findings, findings
    return build_config(registry.get("stages", stage).Config, checker.fill(schema, copy.deepcopy(dict(options)), set()))


def stage_context(stage: str, folder: Path, inputs: Mapping[str, Artifact], **options: Any) -> StageContext:
    """A context whose logs are collected in `ctx.meta["logs"]`; `folder` holds its out and scratch folders."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    defaults = {"objective": {"kd": "teacher"}, "batch": {"sequences": 4}, "evaluate_every": 4}
    ctx = StageContext(
        id=stage,
        config=stage_config(stage, {**defaults, **options}),
        seed=7,
        inputs=inputs,
        out=folder / "out",
        scratch=folder / "scratch",
        runtime=Runtime(threads=1),
        groups=GROUPS,
    )
    logs: list[str] = ctx.meta.setdefault("logs", [])

    def emit(kind: str, values: Mapping[str, Any]) -> None:
        if kind == "log":
            logs.append(values["message"])

    ctx.emit = emit
    return ctx


def run_stage(ctx: StageContext) -> None:
    """Run the stage that `ctx` was made for."""
    Registry().get("stages", ctx.id)().run(ctx)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model artifact."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


KILLED = {
    "train": {"steps": 8},
    "layerwise": {"steps": 4, "layerwise": {}},
    "lora_recover": {
        "steps": 6,
        "refit_steps": 5,
        "rank": 2,
        "dropout": 0.1,
        "start": "error",
        "refit_weights": 0.03,
    },
}
"""Options of the stages that are killed in tests."""


def main(folder: str, stage: str, loop: str, step: str, options: str | None = None) -> None:
    """Checkpoint every second step and die, as by `kill -9`, when the loop named `loop` has done `step` steps."""
    import a1q.training.loop as loop_module

    inputs = {
        "model": Artifact("model", Path(folder, "quantized"), "m" * 64),
        "teacher": Artifact("teacher", Path(folder, "teacher"), "t" * 64),
        "teacher_model": Artifact("model", Path(folder, "dense"), "d" * 64),
    }
    ctx = stage_context(stage, Path(folder, "killed"), inputs, **KILLED[options or stage])

    def emit(kind: str, values: Mapping[str, Any]) -> None:
        here = (ctx.scratch / loop).exists()
        if kind == "progress" and here and values["step"] == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    ctx.emit = emit
    due = loop_module._Loop._due
    loop_module._Loop._due = lambda self: (self.at.step + 1) % 2 == 0 or due(self)  # type: ignore[method-assign]
    run_stage(ctx)


if __name__ == "__main__":
    main(*sys.argv[1:])
