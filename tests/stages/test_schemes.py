"""Every scheme goes through every stage that touches quantized modules."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.exporters.packed import PackedConfig, PackedExporter
from a1q.exporters.safetensors import SafetensorsConfig, SafetensorsExporter
from a1q.models.checkpoint import load_model
from a1q.quant.linear import quantized_modules
from tests.exporters.conftest import context
from tests.stages.quantizing import plan, run, view_of
from tests.training.student import build

CHAINS = [
    ({"scheme": "balanced", "bits": 4, "granularity": "channel"}, {"scheme": "balanced", "bits": 2}),
    ({"scheme": "affine", "bits": 8}, {"symmetric": False, "granularity": "group", "group_size": 16, "bits": 2}),
    ({"scheme": "lut_lowrank", "bits": 4}, {"scheme": "balanced", "bits": 2, "granularity": "channel"}),
    ({"scheme": "balanced", "bits": 3}, {"scheme": "affine"}),
    ({"scheme": "lut_lowrank", "bits": 3}, {"scheme": "vector_lut", "bits": 2}),
    ({"scheme": "vector_lut", "bits": 3}, {"bits": 1.5, "vector": 4}),
    ({"scheme": "lut_lowrank", "bits": 4}, {"bits": 2, "lut": "symmetric"}),
]
TRAIN = {
    "objective": {"kd": "teacher"},
    "steps": 10,
    "batch": {"sequences": 16},
    "evaluate_sequences": 12,
    "lr": {"weights": 5e-4, "scales": 1e-3},
    "trainable": ["weights", "scales"],
    "straight_through_fp16": True,
}


@pytest.mark.parametrize(("first", "then"), CHAINS, ids=lambda spec: spec.get("scheme", ""))
def test_through_all_stages(tmp_path: Path, first: dict[str, Any], then: dict[str, Any]) -> None:
    inputs = build(tmp_path, spec=first)
    teacher = inputs["teacher"]
    artifact = inputs["model"]
    for stage, options in (
        ("convert", {"rules": {"mlp": then, "attn": then}, "kl_sequences": 0}),
        ("train", TRAIN),
        ("lora_recover", {"objective": {"kd": "teacher"}, "rank": 2, "steps": 4, "refit_steps": 4, "merge": "refit"}),
        ("snap", {"kl_sequences": 0}),
    ):
        outcome, problems = plan(stage, {"model": view_of(artifact), "teacher": {}}, options)
        assert problems == []
        artifact, ctx = run(stage, tmp_path / "run", {"model": artifact, "teacher": teacher}, options)
        assert view_of(artifact).modules == outcome.view.modules
        if stage == "train":
            assert ctx.metrics["kl_after"] < ctx.metrics["kl_before"]
        if stage == "snap":
            assert ctx.metrics["worst_error"] < 1e-5
    weights = {name: module.dequantize() for name, module in quantized_modules(load_model(artifact.path))}
    assert len(weights) == 14

    packed, dense = context(tmp_path / "packed"), context(tmp_path / "dense-out")
    PackedExporter().export(artifact, PackedConfig(latent="drop"), packed)
    for name, module in quantized_modules(load_model(packed.out)):
        assert torch.equal(module.dequantize(), weights[name])
    SafetensorsExporter().export(artifact, SafetensorsConfig("5GB", 16, 0.9999), dense)
    assert json.loads((dense.out / "config.json").read_text())["dtype"] == "float16"
    assert isinstance(artifact, Artifact) and dense.metrics["cosine"] > 0.9999


def test_plans_describe_schemes_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    inputs = build(tmp_path)
    dense = view_of(Artifact("model", tmp_path / "dense", ""))

    def quantize(**spec: Any):
        return plan("quantize", {"model": dense}, {"rules": {"mlp": spec}})

    for spec, words in (
        ({"scheme": "balanced", "bits": 2}, "balanced 2 bit a scale per tensor, 2.0"),
        (
            {"scheme": "affine", "bits": 4, "granularity": "group", "symmetric": False},
            "affine 4 bit a scale and a zero point per 32 inputs, 4.62 bits per weight",
        ),
        ({"scheme": "affine", "bits": 8}, "affine 8 bit a scale per channel, 8."),
        ({"scheme": "vector_lut", "bits": 1.5}, "vector_lut 1.5 bit vectors of 2, rank 1, 1.96 bits"),
    ):
        outcome, problems = quantize(**spec)
        assert problems == []
        assert outcome.notes[0].startswith(f"mlp: 6 modules -> {words}")
    _, ((path, message, hint, mismatch),) = quantize(scheme="affine", bits=4, granularity="group", group_size=48)
    assert (path, mismatch) == ("rules.mlp", True)
    assert message == "`group_size: 48` does not divide 64 inputs; near it 32 and 64 do"
    assert "up_proj" in hint
    _, ((path, message, _, _),) = quantize(scheme="vector_lut", bits=2, vector=4)
    assert path == "rules.mlp"
    assert message.startswith("256 vectors of 4 are more than the 256 numbers that a table may have on a Neural Engine")
    one = {"rules": {"mlp": {"bits": 1}}}
    single, _ = run("convert", tmp_path / "run", {"model": inputs["model"]}, one)
    _, ((_, message, _, _),) = plan("convert", {"model": view_of(single)}, {"rules": {"mlp": {"scheme": "affine"}}})
    assert message == "scheme 'affine': `bits: 1` is none of 2, 3, 4, 6, 8"
