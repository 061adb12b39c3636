"""`a1q inspect` on everything a run makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cli.support import a1q
from tests.cli.test_validate import HEAVY, loaded_by

pytestmark = pytest.mark.usefixtures("beside")


def facts(name: str, *options: str) -> dict:
    result = a1q("inspect", name, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_model(looked: Path) -> None:
    found = facts("looked")
    assert found["kind"] == "model" and found["model_type"] == "qwen3" and found["layers"] == 2
    rules = {rule["scheme"]["scheme"]: rule for rule in found["rules"] if rule["scheme"]}
    assert len(rules["lut_lowrank"]["modules"]) == 6 and len(rules["lut"]["modules"]) == 8
    numbers = rules["lut_lowrank"]["numbers"]
    assert numbers["entries"] == [4] and 0 < numbers["entropy"] <= 2 and numbers["fp16_rounding"] == 0
    assert 0 < numbers["scale_least"] < numbers["scale_most"]
    report = json.loads((looked / "runs" / "looked" / "report.json").read_text())
    snapped = next(item for item in report["stages"] if item["id"] == "final")
    assert found["bpw"] == pytest.approx(snapped["metrics"]["bpw"])
    assert sum(found["bytes_by_kind"].values()) < found["bytes"]
    fitted = facts("looked:fitted")
    assert fitted["bytes_by_kind"]["latents"] == 4 * sum(rule["weights"] for rule in fitted["rules"] if rule["scheme"])
    text = a1q("inspect", "looked").output
    for part in ("lut_lowrank 2 bit rank 1, snapped", "model.layers.{0..1}.mlp.down_proj", "entries never used"):
        assert part in text


def test_dense_tensors_and_fp16(tmp_path: Path) -> None:
    folder = shutil.copytree("tiny", tmp_path / "odd")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 70000.0
    tensors["model.layers.1.self_attn.q_proj.weight"][1, 1] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = facts(str(folder))["dense"]
    assert {kind: item["tensors"] for kind, item in found.items()} == {
        "embeddings": 1,
        "dense linears": 14,
        "norms and biases": len(tensors) - 15,
    }
    assert found["norms and biases"]["half"]["beyond"] == 1 and found["norms and biases"]["largest"] == 70000.0
    assert found["dense linears"]["not_finite"] == ["model.layers.1.self_attn.q_proj.weight"]
    weight = tensors["model.embed_tokens.weight"].double()
    weight = weight[weight != 0]
    wanted = ((weight.half().double() - weight) / weight).square().mean().sqrt()
    assert found["embeddings"]["half"]["rounding"] == pytest.approx(float(wanted), rel=1e-4)
    text = a1q("inspect", folder).output
    assert "1 numbers beyond 65504" in text and "NOT FINITE: model.layers.1.self_attn.q_proj.weight" in text
    assert set(facts("looked")["dense"]) == {"embeddings", "norms and biases"}


def test_a_quantized_module_that_is_not_finite(looked: Path, tmp_path: Path) -> None:
    report = json.loads((looked / "runs" / "looked" / "report.json").read_text())
    artifact = next(item["artifact"] for item in report["stages"] if item["id"] == "fitted")
    folder = shutil.copytree(artifact, tmp_path / "odd")
    (folder / "artifact.json").unlink()
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        tensors, facts_inside = {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata()  # noqa: SIM118
    tensors["model.layers.0.self_attn.q_proj.lut"].view(-1)[0] = float("inf")
    tensors["model.layers.1.mlp.up_proj.a"].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata=facts_inside)
    odd = [name for rule in facts(str(folder))["rules"] if rule["numbers"] for name in rule["numbers"]["not_finite"]]
    assert sorted(odd) == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert "NOT FINITE: model.layers.1.mlp.up_proj" in a1q("inspect", folder).output


def test_single_modules() -> None:
    text = a1q("inspect", "looked", "--module", r".*1\.mlp\.up_proj").output
    rows = [line for line in text.splitlines() if line.startswith("model.layers.") and "96x64" in line]
    assert len(rows) == 1 and rows[0].startswith("model.layers.1.mlp.up_proj")
    assert a1q("inspect", "looked", "--modules").output.count("x64 ") >= 10
    missed = a1q("inspect", "looked", "--module", "model.layers.1.mlp.up_prij")
    assert missed.exit_code == 2 and "did you mean model.layers.1.mlp.up_proj?" in missed.output
    broken = a1q("inspect", "looked", "--module", "(")
    assert broken.exit_code == 2 and "--module" in broken.output


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("looked:teacher", "teacher", ["32 + 4 sequences of 16 tokens, top 16 of 320 logits and 16 others"]),
        ("looked:statistics", "statistics", ["15 modules", "16 sequences, 256 tokens", "mlp.gate_proj"]),
        ("looked:ane", "package", ["layout single, context 128", "indices", "infer 1"]),
        ("looked:hf", "model", ["14 modules", "linears, dense, 16.000 bits"]),
        ("tiny", "model", ["vocabulary 320, tied"]),
        ("builtin:pico", "model", ["3,672,832 parameters"]),
    ],
)
def test_what_else_there_is(name: str, kind: str, words: list[str]) -> None:
    result = a1q("inspect", name)
    assert result.exit_code == 0, result.output
    assert f": {kind}, " in result.output
    assert all(word in result.output for word in words), result.output
    json.dumps(facts(name), allow_nan=False)


def test_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained("tiny"), LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    text = a1q("inspect", tmp_path / "adapter").output
    assert "adapter" in text and "of tiny, rank 3 on 2 modules" in text


def test_damage_is_named(looked: Path, tmp_path: Path) -> None:
    report = json.loads((looked / "runs" / "looked" / "report.json").read_text())
    artifact = Path(next(item["artifact"] for item in report["stages"] if item["id"] == "final"))
    copy = shutil.copytree(artifact, tmp_path / "copy")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    result = a1q("inspect", copy)
    assert result.exit_code == 3 and "is damaged: model.safetensors is not what was published" in result.output
    (copy / "artifact.json").unlink()
    (copy / "model.safetensors").write_bytes(content[:-100])
    result = a1q("inspect", copy)
    assert result.exit_code == 3 and "truncated or damaged" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nothing/here", 3, "nothing/here"),
        ("lookd:final", 2, "there is no run 'lookd'"),
        ("looked:finall", 2, "did you mean"),
        ("looked.yaml", 3, "looked.yaml"),
    ],
)
def test_what_is_not_there(name: str, code: int, words: str) -> None:
    result = a1q("inspect", name)
    assert result.exit_code == code and words in result.output and "Traceback" not in result.output


def test_modules_of_what_has_none() -> None:
    result = a1q("inspect", "looked:teacher", "--modules")
    assert result.exit_code == 2 and "is a teacher" in result.output


@pytest.mark.parametrize("name", ["inspect", "eval", "compare", "plot"])
def test_help_loads_nothing_heavy(name: str) -> None:
    assert loaded_by(name, "--help", heavy=(*HEAVY, "matplotlib")) == [0, []]
