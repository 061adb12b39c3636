"""An adapter named in a recipe, by the command line: the right exit code at the right line, and content in the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import demo
from tests.cli.support import a1q
from tests.data.text import sentence
from tests.tiny import tiny_folder, tiny_model

RECIPE = """\
a1q: 1
name: on
seed: 7
model: {{source: {model}}}
data:
  text: {{source: {text}, seq_len: 16, holdout: 0.2}}
groups:
  up: {{match: 'model\\.layers\\.0\\.mlp\\.up_proj'}}
stages:
  - id: teacher
    kd: {{data: text, cache: {{sequences: 8, tune_sequences: 2, top_k: 8, random_negatives: 8}}}}
  - quantize: {{rules: {{up: {{scheme: balanced, bits: 2}}}}}}
  - id: recover
    lora_recover:
      objective: {{kd: teacher{objective}}}
      rank: 2
      steps: 1
      merge: adapter
      batch: {{sequences: 2}}
      adapter: {{source: {adapter}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_folder(folder / "model")
    lines = [json.dumps({"text": sentence(number)}) + "\n" for number in range(200)]
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def peft_folder(folder: Path, module: str, seed: int = 0) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model

    base = tiny_model()
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=[module], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def written(place: Path, folder: Path, adapter: Path, objective: str = "") -> Path:
    text = RECIPE.format(model=place / "model", text=place / "text.jsonl", adapter=adapter, objective=objective)
    (folder / "on.yaml").write_text(text, encoding="utf-8")
    return folder / "on.yaml"


def test_what_does_not_fit_is_said_at_its_line(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    other = peft_folder(tmp_path / "other", "model.layers.1.mlp.up_proj")
    for adapter, reason in ((tmp_path / "none", "has no adapter_config.json"), (other, "model.layers.1.mlp.up_proj")):
        done = a1q("plan", written(place, tmp_path, adapter))
        assert done.exit_code == 3 and reason in done.output and "on.yaml:20:25" in done.output, done.output
        assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "holds no JSON object"),
        ("{", "is no whole adapter"),
        ('{"peft_type": "LORA"}', "doesn't say the alpha"),
        ('{"lora_alpha": "x"}', "doesn't say the alpha"),
        ('{"lora_alpha": 8, "alpha_pattern": {"(": 1}}', "doesn't say the alpha"),
        ('{"lora_alpha": 8, "alpha_pattern": [1]}', "doesn't say the alpha"),
    ],
)
def test_a_damaged_config_is_no_crash(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    adapter = peft_folder(tmp_path / "adapter", "model.layers.0.mlp.up_proj")
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
    done = a1q("plan", written(place, tmp_path, adapter))
    assert done.exit_code == 3 and reason in done.output and "Traceback" not in done.output, done.output


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (", kl: 0", "every weight is 0"),
        (", targets: asistant", "assistant"),
        (", targets: assistant", "the data of `teacher` are plain text"),
    ],
)
def test_objectives_are_judged_at_their_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, reason: str
) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    recipe = written(place, tmp_path, peft_folder(tmp_path / "adapter", "model.layers.0.mlp.up_proj"), objective)
    done = a1q("plan", recipe, "--set", "data.text.format=text")
    assert done.exit_code == 2 and "Traceback" not in done.output, done.output
    assert "on.yaml:15:" in done.output and reason in done.output, done.output


def test_another_adapter_in_the_same_folder_is_another_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    adapter = tmp_path / "adapter"
    caches = []
    for number, seed in enumerate((0, 0, 1)):
        recipe = written(place, tmp_path, peft_folder(adapter, "model.layers.0.mlp.up_proj", seed))
        done = a1q("run", recipe, "-o", tmp_path / f"run{number}")
        assert done.exit_code == 0, done.output
        caches.append({item["id"]: item["cache"] for item in demo.report(tmp_path / f"run{number}")["stages"]})
    assert [found["recover"] for found in caches] == ["miss", "hit", "miss"] and caches[2]["teacher"] == "hit"
