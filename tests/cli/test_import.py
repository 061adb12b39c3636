"""`a1q import`: checkpoints of theirs go through recipes, exports and the store; wrong ones leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from a1q.models.checkpoint import load_model
from a1q.models.view import read_view
from a1q.quant.module import quantized_modules
from tests.cli.support import a1q, process, report
from tests.cli.test_validate import HEAVY, loaded_by
from tests.importing.formats import apple, v1, v2
from tests.importing.test_pickled import Touch
from tests.tiny import TEXT, tiny_folder

MEASURE = ("--data", "text.jsonl", "--sequences", 2, "--seq-len", 32)
RECIPE = """\
a1q: 1
name: imported
runtime: {device: cpu, threads: 1}
model: {source: out}
data:
  text: {source: text.jsonl, seq_len: 32, holdout: 0.3}
stages:
  - id: teacher
    kd: {data: text, model: {source: tiny}, cache: {top_k: 8, random_negatives: 8, sequences: 4, tune_sequences: 2}}
  - id: trained
    train: {objective: {kd: teacher}, steps: 2, batch: {sequences: 2}, trainable: [weights, scales, lut], keep: last}
  - id: final
    snap: {from: model}
  - id: hf
    export: {format: safetensors, from: final}
  - id: whole
    export: {format: packed, from: final}
  - id: ane
    export: {format: coreml, from: final, context: 128, prefill: 32, verify: {prompt: 34, generate: 2, random: 0}}
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the base, `tiny`, and a text; what is imported goes to `out`."""
    tiny_folder(tmp_path / "tiny")
    lines = (json.dumps({"text": f"{number} {' '.join(TEXT)}"}) for number in range(24))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def refused(code: int, *arguments: object) -> str:
    """The message of an import that fails with `code` and leaves nothing."""
    before = sorted(Path().iterdir())
    result = a1q("import", "-o", "out", *MEASURE, *arguments)
    assert result.exit_code == code, result.output
    assert sorted(Path().iterdir()) == before and "Traceback" not in result.output
    return result.stderr


def facts(*arguments: object) -> dict:
    result = a1q("import", *arguments, "-o", "out", *MEASURE, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_a_checkpoint_to_a_core_ml_package_and_to_another_machine(work, monkeypatch):
    """V2 at ranks 6 and 3: imported, trained on, snapped, exported twice, packed and unpacked."""
    tiny_folder(work / "tiny", head_dim=32)
    written = v2(head_dim=32)
    written.save(Path("from"))
    found = facts("from", "--base", "tiny")
    assert found["kinds"] == {"V2": 14} and found["latents"] == 14 and found["derived"] == []
    view = read_view(Path("out"))
    assert view.modules["model.layers.0.mlp.up_proj"].scheme["rank"] == 6
    assert {module.state for module in view.modules.values()} == {"quantized", "dense"}

    looked = json.loads(a1q("inspect", "out", "--json").stdout)
    quantized = [rule for rule in looked["rules"] if rule["scheme"]]
    assert sum(len(rule["modules"]) for rule in quantized) == 14
    assert {rule["numbers"]["entries"][0] for rule in quantized} == {4, 16}
    Path("recipe.yaml").write_text(RECIPE)
    result = a1q("run", "recipe.yaml", "-o", "run")
    assert result.exit_code == 0, result.output
    final = load_model(work / "run" / "export" / "hf")
    for name, weight in written.weights.items():
        dense = final.get_submodule(name).weight.detach().double().numpy()
        assert np.abs(dense - weight).max() < 4e-3 * np.abs(weight).max()  # fp16 in A, B and the weight
    assert (work / "run" / "export" / "ane" / "model.mlpackage").is_dir()
    whole = dict(quantized_modules(load_model(work / "run" / "export" / "whole")))
    assert whole.keys() == written.weights.keys() and {module.state for module in whole.values()} == {"snapped"}
    stages = {stage["id"]: stage for stage in report(work / "run")["stages"]}
    assert stages["ane"]["metrics"]["cosine_fp32"] > 0.9999
    assert "2 bit rank 6, snapped" in a1q("inspect", "run:final").stdout
    packaged = json.loads(a1q("eval", "run:ane", "--against", "run:final", "--tokens", 8, "--json").stdout)
    assert packaged["kl"] < 1e-5

    assert a1q("store", "pack", "run", "-o", "run.tar").exit_code == 0
    monkeypatch.setenv("A1Q_HOME", str(work / "elsewhere"))
    assert a1q("store", "unpack", "run.tar").exit_code == 0
    key = stages["final"]["key"]
    there = load_model(work / "elsewhere" / "store" / key[:2] / key)
    here = load_model(Path(stages["final"]["artifact"]))
    for (name, one), (_, other) in zip(quantized_modules(here), quantized_modules(there), strict=True):
        assert torch.equal(one.dequantize(), other.dequantize()), name


def test_what_was_found_is_said(work):
    v1(negative=0.05).save(Path("from"))
    v1().save(Path("from"), "best_state_dict.pt")
    result = a1q("import", "from", "--base", "tiny", "-o", "out", *MEASURE)
    assert result.exit_code == 0, result.output
    for text in (
        "not read, beside it: best_state_dict.pt",
        "14 V1",
        "lut_lowrank, 2 bits, rank 6: model.layers.{0..1}.mlp gate_proj up_proj down_proj",
        "not stored in 14 modules",
        "floored     ",
        "nats per token to tiny, over 2 x 32 tokens of text.jsonl",
        "bits per weight",
    ):
        assert text in result.stdout
    assert a1q("generate", "out", "--prompt", "Return", "--max-tokens", "2", "--device", "cpu").exit_code == 0


def test_the_divergence_is_that_of_eval(work):
    from a1q.data import read_sequences
    from a1q.distill.evaluate import evaluate_model

    v2().save(Path("from"))
    found = facts("from", "--base", "tiny")["against_base"]
    text = read_sequences({"source": "text.jsonl"}, Path("tiny"), "test", 32, 2, 0)
    expected = evaluate_model(load_model(Path("out")), load_model(Path("tiny")), text.tokens)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5) and found["kl"] > 0.01
    assert (found["data"], found["sequences"], found["seq_len"]) == ("text.jsonl", 2, 32)


def test_nothing_is_compared_unless_there_is_something_to_compare_on(work):
    apple().save(Path("from"), "qat_state_dict.pt")
    assert "has text for 0 sequences" in refused(1, "from", "--base", "tiny", "--data", _short(work))
    result = a1q("import", "from", "--base", "tiny", "-o", "out", "--sequences", 0)
    assert result.exit_code == 0 and "not measured" in result.stdout


def _short(work: Path) -> Path:
    (work / "short.txt").write_text("one line")
    return work / "short.txt"


def test_the_config_names_the_base(work):
    v1().save(Path("from"))
    assert facts("from")["base"] == "tiny"
    (work / "from" / "config.json").unlink()
    (work / "out").rename(work / "done")
    assert "--base Qwen/Qwen3-0.6B" in refused(2, "from/model_state_dict.pt")


def test_adapters_alone_become_an_adapter(work):
    written = v2(adapter=2)
    written.state = {key: item for key, item in written.state.items() if "lora_" in key}
    written.save(Path("from"), "lora_only_state_dict.pt")
    found = facts("from", "--base", "tiny")
    assert found["kind"] == "adapter" and found["alpha"] == 4 and len(found["adapters"]) == 14
    assert sorted(item.name for item in Path("out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_alpha_can_be_said(work):
    written = v2(adapter=2)
    del written.config["lora_alpha"]
    written.save(Path("from"))
    assert "--alpha 2" in refused(3, "from", "--base", "tiny")
    assert facts("from", "--base", "tiny", "--alpha", "6")["alpha"] == 6


def test_of_a_cache_the_text_and_a_recipe_come_over(work):
    from tests.importing.test_caches import write_cache

    write_cache(Path("cache"), Path("tiny"), count=60)
    result = a1q("import", "cache", "--base", "tiny", "-o", "out", "--sequences", 4)
    assert result.exit_code == 0, result.output
    for text in (
        "60 sequences of 16 tokens",
        "100.00% of them the same tokens again",
        "tiny ranks the cached",
    ):
        assert text in result.stdout
    assert "not taken: without the logsumexp" in result.stdout and "a1q run out/recipe.yaml" in result.stdout
    assert a1q("plan", "out/recipe.yaml").exit_code == 0
    found = json.loads(a1q("import", "cache", "-o", "again", "--base", "tiny", "--json").stdout)
    assert found["same_first"] == 1 and found["cached"]["top_k"] == 5


# -- refusals ----------------------------------------------------------------------------------------------------
def test_a_pickle_that_would_execute_code_does_not(work):
    Path("from").mkdir()
    torch.save({**v2().state, "extra": Touch(work / "touched")}, "from/a.pt")
    assert "would execute code when they are read: posix.open" in refused(3, "from", "--base", "tiny")
    assert not (work / "touched").exists()


def test_broken_and_foreign_files(work):
    path = v1().save(Path("from"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is no whole file of torch.save" in refused(3, "from", "--base", "tiny")
    path.write_bytes(whole)
    (work / "from" / "config.json").write_text('{"lut_size": 16, "scale_rank": 6}')
    message = refused(3, "from", "--base", "tiny")
    assert "lut_size is 16" in message and "have tables of 4 entries" in message
    v1(num_hidden_layers=3).save(Path("from"))
    assert "the base has no model.layers.2" in refused(3, "from", "--base", "tiny")
    written = v1()
    written.state["model.layers.0.mlp.up_proj.scale_A"][0, 0] = float("nan")
    written.save(Path("from"))
    assert "scale_A holds 1 numbers that are not finite" in refused(3, "from", "--base", "tiny")
    del written.state["model.layers.0.mlp.up_proj.scale_A"]
    written.save(Path("from"))
    assert "lacks scale_A" in refused(3, "from", "--base", "tiny")


def test_a_command_line_that_is_wrong(work):
    v1().save(Path("from"))
    assert "there is no checkpoint" in refused(2, "form", "--base", "tiny")
    assert "no such folder" in refused(3, "from", "--base", "./tinny")
    assert "there is no file" in refused(2, "from", "--base", "tiny", "--config", "no.json")
    Path("out").mkdir()
    Path("out/mine").touch()
    assert "is there already" in refused(2, "from", "--base", "tiny")
    result = a1q("import", "from", "--base", "tiny", "-o", "out", "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["ok"] is False


def test_a_full_disk_leaves_nothing(work, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    v1().save(Path("from"))
    monkeypatch.setattr("a1q.models.checkpoint.save_model", full)
    assert "no space left" in refused(1, "from", "--base", "tiny")


def test_in_a_process_of_its_own_nothing_but_the_result_is_printed(work):
    v2().save(work / "from")
    command = ("import", work / "from", "--base", work / "tiny", "-o", work / "out", "--sequences", 0, "--json")
    done = process(*command, home=work / "home")
    assert done.returncode == 0 and json.loads(done.stdout)["weights"] == 61440
    assert done.stderr == ""


def test_help_loads_nothing_heavy():
    assert loaded_by("import", "--help", heavy=HEAVY) == [0, []]
