"""Every shipped recipe from end to end, shortened; `q4_to_q2` has tests of its own in test_demo.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import demo
from tests.cli.support import a1q
from tests.data.text import sentence
from tests.tiny import tiny_family_folder

TEXT = "data.text={source: {text}, seq_len: 32, holdout: 0.2}"
VERIFY = "{prompt: 40, generate: 4, random: 16}"
SHORT = [f"stages.{export}.{option}" for export in ("ane", "app") for option in ("context=128", f"verify={VERIFY}")]
FAMILY = [
    "model.source={model}",
    TEXT,
    "groups.mlp.expect={mlp}",
    "groups.attn.expect={attn}",
    "stages.teacher.cache.top_k=32",
    "stages.check.gate={}",
    *SHORT,
]
MODEL_TYPES = {
    "qwen2.5-0.5b/q2a4": "qwen2",
    "llama-3.2-1b/q2a4": "llama",
    "mistral-7b/q2a4": "mistral",
    "gemma-3-270m/q2a4": "gemma3_text",
}
"""The family of the tiny model that a recipe runs on; Qwen3 where nothing is said."""
SETTINGS = {
    **dict.fromkeys(MODEL_TYPES, FAMILY),
    "q2a4": ["model.source={model}", TEXT, *SHORT],
    "q4": ["model.source={model}", TEXT, "stages.eval.gate={}", "stages.ane.context=128"],
    "pico": [
        "data.prose={source: builtin:prose, seq_len: 32}",
        "stages.pico.architecture={hidden_size: 64, intermediate_size: 96, num_hidden_layers: 1}",
        "stages.pico.tokenizer.vocab=300",
        "stages.pico.batch.sequences=2",
    ],
    "qwen3-0.6b/q4_to_q2": [
        "model.source={model}",
        TEXT,
        "groups.mlp.expect={mlp}",
        "groups.attn.expect={attn}",
        "stages.teacher.cache.top_k=32",
        "stages.check.gate={}",
        "stages.ane.context=128",
    ],
}
"""`--set`s that make a recipe fit a tiny model and the built-in text; `--smoke` does the rest."""


def test_every_shipped_recipe_is_run_somewhere():
    folder = demo.RECIPE.parent
    shipped = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    assert shipped == {*SETTINGS, "q4_to_q2"}


def _filled(text: str, facts: Mapping[str, str]) -> str:
    for name, value in facts.items():
        text = text.replace(name, value)
    return text


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all runs."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("name", SETTINGS)
def test_it_runs_to_its_exports(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A1Q_HOME", str(home))
    model_type = MODEL_TYPES.get(name, "qwen3")
    one_layer = {} if model_type == "gemma3_text" else {"num_hidden_layers": 1}  # Gemma has two kinds of layers
    model = tiny_family_folder(tmp_path / "model", model_type, **one_layer)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(400)), encoding="utf-8")
    facts = {"{model}": str(model), "{text}": str(text), "{mlp}": str(3 * layers), "{attn}": str(4 * layers)}
    sets = [word for item in SETTINGS[name] for word in ("--set", _filled(item, facts))]
    done = a1q("run", name, "-o", tmp_path / "run", "--smoke", *sets)
    assert done.exit_code == 0, done.output
    report = demo.report(tmp_path / "run")
    assert report["status"] == "done"
    exports = [stage["id"] for stage in report["stages"] if stage["stage"] == "export"]
    assert exports and all(any((tmp_path / "run" / "export" / export).iterdir()) for export in exports)
