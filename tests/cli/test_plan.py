"""`a1q plan`: every shipped recipe fits its model, and what is printed is what would run."""

import json
import re

import pytest

from a1q.recipe import shipped_recipes
from tests.cli.support import a1q, process
from tests.cli.test_validate import loaded_by
from tests.recipe.fakes import header_model

HEAVY = ("torch", "transformers", "coremltools", "datasets", "peft", "tokenizers")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return header_model(tmp_path_factory.mktemp("model") / "tiny", layers=4)


@pytest.mark.parametrize("name", [name for name in sorted(shipped_recipes()) if "/" not in name])
def test_shipped_recipes_can_be_planned(name):
    """Those of models on the Hub are planned for the real shapes in tests/test_recipes.py."""
    result = a1q("plan", name)
    assert result.exit_code == 0, result.output


def test_the_demo_on_a_model_folder(model):
    result = a1q("plan", "q4_to_q2", "--set", f"model.source={model}")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    numbered = [match.groups() for line in lines if (match := re.match(r" +(\d+)  (\w+): (\w+) ", line))]
    ids = ["teacher", "calibrate", "q4", "q4_train", "q2", "q2_train", "recover", "final", "check"]
    ids += ["hf", "ane", "anemll"]
    assert [item[:2] for item in numbered] == [(str(number), name) for number, name in enumerate(ids, 1)]
    assert "model.layers.{0..3}.mlp.gate_proj" in result.output
    assert re.search(r"^disk +\S+ \wB expected, \S+ \wB free at ", result.output, re.MULTILINE)
    assert re.search(r"^memory +\S+ \wB expected at most", result.output, re.MULTILINE)


def test_json_tells_modules_and_costs(model):
    result = a1q("plan", "q4_to_q2", "--set", f"model.source={model}", "--json")
    document = json.loads(result.stdout)
    stages = {stage["id"]: stage for stage in document["stages"]}
    assert len(stages["q4"]["modules"]["mlp"]) == 12
    assert len(stages["q4"]["modules"]["attn"]) == 16
    assert stages["q2_train"]["inputs"] == {"model": "q2", "teacher": "teacher", "teacher_model": "model"}
    assert document["disk"]["expected"] == sum(stage["disk_bytes"] for stage in stages.values()) > 0
    assert document["memory"]["expected"] == max(stage["memory_bytes"] for stage in stages.values()) > 0
    assert document["disk"]["free"] > 0


@pytest.mark.parametrize("has", [True, False])
def test_bf16_on_a_processor_without_it_is_noted(model, monkeypatch, has):
    monkeypatch.setattr("a1q.recipe.runtime.multiplies_bf16", lambda: has)
    asked = ("plan", "q4_to_q2", "--set", f"model.source={model}", "--set", "runtime={device: cpu, amp: bf16}")
    assert ("note: this CPU has no bf16 instructions" in a1q(*asked).output) is not has
    assert len(json.loads(a1q(*asked, "--json").stdout)["notes"]) == (not has)


CONTRADICTING = """\
a1q: 1
name: contradicting
data:
  text: {source: TEXT, seq_len: 16}
groups:
  mlp: {match: 'model\\.layers\\.\\d+\\.mlp\\.(gate|up|down)_proj'}
stages:
  - kd: {data: text, cache: {random_negatives: 8}}
  - quantize: {rules: {mlp: {scheme: lut_lowrank, bits: 2}}}
  - train:
      objective:
        kd: kd
        local: 0.1
  - id: second
    from: quantize
    train:
      objective:
        kd: kd
        online: true
        tail: bucket
"""


def test_objectives_that_contradict_themselves_are_refused_at_their_lines(model, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "some text"}\n' * 4)
    path = tmp_path / "recipe.yaml"
    path.write_text(CONTRADICTING.replace("TEXT", str(tmp_path / "text.jsonl")))
    result = process("plan", path, "--set", f"model.source={model}", home=tmp_path / "home")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{path}:13:16: stages.train.objective.local: the cache has no hidden states" in result.stderr
    assert f"{path}:20:15: stages.second.objective.tail: `tail: bucket` is about a cached teacher" in result.stderr


def test_smoke_plans_the_tiny_run(model):
    full, smoke = (
        json.loads(a1q("plan", "q4_to_q2", "--set", f"model.source={model}", "--json", *flag).stdout)
        for flag in ([], ["--smoke"])
    )
    assert smoke["disk"]["expected"] < full["disk"]["expected"]


def test_a_mismatch_is_exit_code_3_also_as_json(model):
    result = a1q("plan", "q4_to_q2", "--set", f"model.source={model}", "--set", "groups.mlp.expect=13", "--json")
    assert result.exit_code == 3
    [problem] = json.loads(result.stdout)["problems"]
    assert problem["path"] == "stages.q4.rules.mlp"


def test_nothing_heavy_is_loaded(model):
    assert loaded_by("plan", "q4_to_q2", "--set", f"model.source={model}", heavy=HEAVY) == [0, []]
