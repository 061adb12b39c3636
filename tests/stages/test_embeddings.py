"""Embeddings and heads tied to them, through every stage and export, planned and run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.exporters.packed import PackedConfig, PackedExporter
from a1q.exporters.safetensors import SafetensorsConfig, SafetensorsExporter
from a1q.models.checkpoint import load_model
from a1q.models.view import read_safetensors_header
from a1q.quant.bits import bpw, bpw_model, module_bits
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.importance import Inputs
from a1q.quant.module import quantized_modules
from a1q.quant.statistics import write_statistics
from a1q.quant.tied import TiedHead
from tests import demo
from tests.exporters.conftest import context
from tests.stages.quantizing import MLP4, plan, run, view_of
from tests.tiny import TEXT, tiny_folder
from tests.training.student import build

EMBEDDING = "model.embed_tokens"
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 320
LUT = {"scheme": "lut", "bits": 6, "granularity": "group", "channels": 8}
ROWS = {"scheme": "lut_lowrank", "bits": 4, "rank": 2}
TRAINING = {"objective": {"kd": "teacher"}, "steps": 6, "batch": {"sequences": 4}, "evaluate_every": 3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(tmp_path_factory.mktemp("teacher"))["teacher"]


def source(folder: Path, tied: bool = True) -> Artifact:
    return Artifact("model", tiny_folder(folder / "source", tie_word_embeddings=tied), "s" * 64)


def logits(artifact: Artifact) -> torch.Tensor:
    with torch.no_grad():
        return load_model(artifact.path)(TOKENS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spec", [LUT, ROWS], ids=lambda spec: spec["scheme"])
def test_every_stage_makes_what_was_planned(tmp_path: Path, teacher: Artifact, spec: dict, tied: bool) -> None:
    artifact = source(tmp_path, tied)
    heads = [EMBEDDING] if tied else [EMBEDDING, "lm_head"]
    dense = load_model(artifact.path).get_submodule(EMBEDDING).weight.detach()
    chain = [
        ("quantize", {"rules": {"head": spec, "mlp": MLP4, **({} if tied else {"lm": spec})}}),
        ("train", {**TRAINING, "groups": ["head"], "keep": "last", "lr": {"weights": 3e-3, "lut": 3e-3}}),
        ("convert", {"rules": {"head": {"bits": 3}}}),
        ("train", {**TRAINING, "trainable": ["scales", "lut"]}),
        ("snap", {}),
    ]
    for stage, options in chain:
        outcome, problems = plan(stage, {"model": view_of(artifact), "teacher": None}, options)
        assert problems == []
        before = artifact
        inputs = {"model": artifact, "teacher": teacher if stage == "train" else None}
        artifact, _ = run(stage, tmp_path / "made", inputs, options)
        assert view_of(artifact).modules == outcome.view.modules, stage
        header = read_safetensors_header(artifact.path / "model.safetensors")
        assert outcome.disk_bytes == max(item["data_offsets"][1] for name, item in header.items() if name[0] != "_")
        assert not [name for name in header if name.endswith("embed_tokens.weight") or name == "lm_head.weight"]
        if stage == "train":
            assert not torch.equal(logits(artifact), logits(before))
    view = view_of(artifact)
    assert view.modules[EMBEDDING].kind == "embedding" and view.modules[EMBEDDING].scheme["bits"] == 3
    assert view.tied == tied
    assert [name for name, _ in quantized_modules(load_model(artifact.path)) if "mlp" not in name] == heads
    weight = load_model(artifact.path).get_submodule(EMBEDDING).dequantize()
    assert 0 < float((weight - dense).square().sum() / dense.square().sum()) < 0.1


def test_a_snapped_tied_model_computes_the_same_bits_after_reading_and_the_same_elsewhere(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from a1q.models.checkpoint import save_model

    rules = {"head": ROWS, "mlp": MLP4, "attn": MLP4}
    artifact, _ = run("quantize", tmp_path / "made", {"model": source(tmp_path)}, {"rules": rules})
    artifact, _ = run("snap", tmp_path / "made", {"model": artifact}, {})
    model = load_model(artifact.path)
    assert isinstance(model.lm_head, TiedHead)
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, again, tokenizer_from=artifact.path)
    assert (again / "model.safetensors").read_bytes() == (artifact.path / "model.safetensors").read_bytes()
    assert torch.equal(logits(Artifact("model", again, "a" * 64)), logits(artifact))

    ctx = context(tmp_path / "hf")
    config = SafetensorsConfig(shard_size="5GB", verify_tokens=32, min_cosine=0.9999)
    SafetensorsExporter().export(artifact, config, ctx)
    assert ctx.metrics["cosine"] > 0.99999 and ctx.metrics["top1"] == 1.0
    plain = AutoModelForCausalLM.from_pretrained(ctx.out, dtype=torch.float32)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(plain.lm_head.weight, model.model.embed_tokens.dequantize().half().float())

    ctx = context(tmp_path / "packed")
    PackedExporter().export(artifact, PackedConfig(latent="drop"), ctx)
    packed = Artifact("model", ctx.out, "p" * 64)
    assert view_of(packed).modules == view_of(artifact).modules
    assert torch.equal(logits(packed), logits(artifact))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_s_inputs_and_how_often_tokens_occur_weigh_the_fit(tmp_path: Path, tied: bool) -> None:
    heard = torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 4
    tokens = np.array([[3, 3, 3, 9, 9, 300, 0, 3]])
    name = EMBEDDING if tied else "lm_head"
    write_statistics(tmp_path, {name: heard}, tokens, embedding=(EMBEDDING, (320, 64)), head=name)
    artifact = source(tmp_path, tied)
    statistics = Artifact("statistics", tmp_path, "t" * 64)
    options = {"rules": {"head": {"scheme": "lut", "bits": 3}}}
    made, _ = run("quantize", tmp_path / "made", {"model": artifact, "statistics": statistics}, options)
    rows = torch.ones(320)
    rows[[3, 9, 300, 0]] += torch.tensor([4.0, 2, 1, 1])
    inputs = Inputs(heard if tied else torch.ones(64), rows=rows)
    dense = load_model(artifact.path).get_submodule(EMBEDDING)
    expected = QuantEmbedding.quantize(dense, {"scheme": "lut", "bits": 3}, inputs)
    assert torch.equal(load_model(made.path).get_submodule(EMBEDDING).lut, expected.lut)
    assert not torch.equal(expected.lut, QuantEmbedding.quantize(dense, {"scheme": "lut", "bits": 3}).lut)


def test_figures_of_linears_leave_embeddings_out_and_the_whole_model_does_not(tmp_path: Path) -> None:
    view = view_of(source(tmp_path))
    without, _ = plan("quantize", {"model": view}, {"rules": {"mlp": MLP4}})
    outcome, problems = plan("quantize", {"model": view}, {"rules": {"mlp": MLP4, "head": LUT}})
    assert problems == []
    assert bpw(outcome.view) == bpw(without.view)
    table = outcome.view.modules[EMBEDDING]
    assert module_bits(table) == 6 * 320 * 64 + 16 * 40 * 64
    saved = 16 * 320 * 64 - module_bits(table)
    assert bpw_model(outcome.view) == pytest.approx(bpw_model(without.view) - saved / view.parameters, rel=1e-12)
    each = f"{module_bits(table) / (320 * 64):.2f} bits per weight"
    assert [line for line in outcome.notes if line.startswith("head: 1 modules -> lut 6 bit") and line.endswith(each)]


def test_rules_that_can_t_be_are_told_where_they_stand(tmp_path: Path) -> None:
    view = view_of(source(tmp_path))
    _, problems = plan("quantize", {"model": view}, {"rules": {"lm": LUT}})
    assert "they are one parameter, model.embed_tokens" in problems[0][2]
    _, problems = plan("quantize", {"model": view}, {"rules": {"head": {**LUT, "channels": 7}}})
    assert problems[0][:2] == ("rules.head", "320 output channels are no multiple of `channels: 7`")
    outcome, problems = plan("quantize", {"model": view}, {"rules": {"mlp": MLP4}, "rest": LUT})
    assert problems == [] and outcome.view.modules[EMBEDDING].state == "dense"

    both, _ = plan("quantize", {"model": view}, {"rules": {"mlp": MLP4, "head": LUT}})
    options = {**TRAINING, "rank": 2, "merge": "adapter"}
    outcome, problems = plan("lora_recover", {"model": both.view, "teacher": None}, options)
    assert problems == []
    assert outcome.view.modules[EMBEDDING].adapter == 0
    assert f"  {EMBEDDING} gets none: it is an embedding" in outcome.notes
    named = {**options, "groups": ["mlp", "head"]}
    _, problems = plan("lora_recover", {"model": both.view, "teacher": None}, named)
    ((path, message, _, mismatch),) = problems
    assert (path, message, mismatch) == ("groups", f"{EMBEDDING}: an embedding, and adapters are for linears", True)
    alone, _ = plan("quantize", {"model": view}, {"rules": {"head": LUT}})
    _, problems = plan("lora_recover", {"model": alone.view, "teacher": None}, options)
    assert "only embeddings are quantized here" in problems[0][1]


@pytest.mark.parametrize("merge", ["adapter", "refit"])
def test_recovery_goes_round_a_quantized_embedding(tmp_path: Path, teacher: Artifact, merge: str) -> None:
    made, _ = run("quantize", tmp_path / "made", {"model": source(tmp_path)}, {"rules": {"mlp": MLP4, "head": ROWS}})
    options = {**TRAINING, "rank": 2, "merge": merge, "refit_steps": 2, "lr": 1e-2}
    recovered, ctx = run("lora_recover", tmp_path / "made", {"model": made, "teacher": teacher}, options)
    before, after = load_model(made.path), load_model(recovered.path)
    assert isinstance(after.lm_head, TiedHead)
    table = after.get_submodule(EMBEDDING)
    for part in (*table.part_names, "latent"):
        assert torch.equal(getattr(table, part), getattr(before.get_submodule(EMBEDDING), part))
    assert table.adapter is None
    if merge == "adapter":
        assert ctx.metrics["kl_adapter"] < ctx.metrics["kl_before"]
        assert view_of(recovered).modules["model.layers.0.mlp.up_proj"].adapter == 2


RECIPE = """
a1q: 1
name: table
runtime: {{threads: 1}}
model: {{source: {model}}}
data:
  text: {{source: {text}, seq_len: 32, holdout: 0.2}}
groups:
  table: {{match: 'model\\.embed_tokens', expect: 1}}
  rest: {{match: 'model\\.layers\\..*'}}
stages:
  - id: teacher
    kd: {{data: text, cache: {{top_k: 16, random_negatives: 16, sequences: 24, tune_sequences: 4, shard_sequences: 8}}}}
  - id: fit
    quantize: {{rules: {{table: {{scheme: lut, bits: 6}}, rest: {{scheme: lut, bits: 6}}}}}}
  - id: fit_train
    train: {{objective: {{kd: teacher}}, steps: 4, batch: {{sequences: 4}}}}
  - id: fewer
    convert: {{rules: {{table: {{scheme: lut_lowrank, bits: 4}}}}}}
  - id: final
    snap: {{dtype: fp16}}
  - id: hf
    export: {{format: safetensors, from: final}}
"""


def test_a_recipe_is_planned_run_and_shown(tmp_path: Path) -> None:
    recipe, out, home = tmp_path / "table.yaml", tmp_path / "run", tmp_path / "home"
    lines = [json.dumps({"text": f"{number}: {line} {number * 37}"}) for number in range(40) for line in TEXT]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {"model": tiny_folder(tmp_path / "model"), "text": tmp_path / "text.jsonl"}
    recipe.write_text(RECIPE.format(**settings), encoding="utf-8")
    a1q = [sys.executable, "-m", "a1q"]
    planned = demo.run([*a1q, "plan", str(recipe)], home)
    assert planned.returncode == 0, planned.stderr
    assert "table: 1 modules -> lut_lowrank 4 bit rank 1" in planned.stdout
    done = demo.run([*a1q, "run", str(recipe), "-o", str(out)], home)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = demo.run([*a1q, "show", str(out)], home)
    assert shown.returncode == 0 and "bpw_model" in shown.stdout
    stages = {stage["id"]: stage for stage in demo.report(out)["stages"]}
    final = Artifact("model", Path(stages["final"]["artifact"]), "f" * 64)
    assert stages["final"]["metrics"]["bpw_model"] == bpw_model(view_of(final)) < 8
