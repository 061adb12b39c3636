"""Every shipped recipe from end to end, shortened; `q4_to_q2` has tests of its own in test_demo.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import demo
from tests.tiny import tiny_family_folder

TEXT = "data.text={source: builtin:prose, seq_len: 32}"
FAMILY = [
    "model.source={model}",
    TEXT,
    "groups.mlp.expect={mlp}",
    "groups.attn.expect={attn}",
    "stages.teacher.cache.top_k=32",
    "stages.check.gate={}",
    "stages.ane.context=128",
    "stages.app.context=128",
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
    "q2a4": ["model.source={model}", TEXT, "stages.ane.context=128", "stages.app.context=128"],
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


@pytest.mark.parametrize("name", SETTINGS)
def test_it_runs_to_its_exports(name: str, tmp_path: Path):
    model_type = MODEL_TYPES.get(name, "qwen3")
    model = tiny_family_folder(tmp_path / "model", model_type)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    facts = {"{model}": str(model), "{mlp}": str(3 * layers), "{attn}": str(4 * layers)}
    sets = [word for item in SETTINGS[name] for word in ("--set", _filled(item, facts))]
    arguments = [sys.executable, "-m", "a1q", "run", name, "-o", str(tmp_path / "run"), "--smoke", *sets]
    done = subprocess.run(arguments, env=demo.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = demo.report(tmp_path / "run")
    assert report["status"] == "done"
    exports = [stage["id"] for stage in report["stages"] if stage["stage"] == "export"]
    assert exports and all(any((tmp_path / "run" / "export" / export).iterdir()) for export in exports)
