"""A finished run of a tiny model, for the commands that look at one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.support import a1q
from tests.data.text import sentence
from tests.tiny import tiny_folder

LOOKED = """\
a1q: 1
name: looked
runtime: {device: cpu, threads: 1}
model: {source: MODEL}
data:
  text: {source: TEXT, seq_len: 16}
groups:
  mlp: {match: '.*mlp.*'}
  attn: {match: '.*self_attn.[qkvo]_proj'}
stages:
  - id: teacher
    kd: {data: text, cache: {sequences: 32, tune_sequences: 4, top_k: 16, random_negatives: 16}}
  - id: statistics
    calibrate: {data: text, sequences: 16}
  - id: fitted
    quantize: {rules: {mlp: {scheme: lut_lowrank, bits: 2}, attn: {scheme: lut, bits: 4}}}
  - id: trained
    train: {objective: {kd: teacher}, steps: 4, batch: {sequences: 4}, trainable: [scales], evaluate_every: 2}
  - id: final
    snap: {}
  - id: hf
    export: {format: safetensors}
  - id: ane
    export: {format: coreml, context: 128, prefill: 32, verify: {prompt: 4, generate: 4, random: 0}}
"""


@pytest.fixture(scope="session")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `tiny`, a text, `text.jsonl`, and a run of the recipe above, `runs/looked`."""
    folder = tmp_path_factory.mktemp("looked")
    model = tiny_folder(folder / "tiny", head_dim=32)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(200)))
    (folder / "looked.yaml").write_text(LOOKED.replace("MODEL", str(model)).replace("TEXT", str(text)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A1Q_HOME", str(folder / "home"))
        result = a1q("run", folder / "looked.yaml", "-o", folder / "runs" / "looked")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def beside(looked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder."""
    monkeypatch.chdir(looked)
    monkeypatch.setenv("A1Q_HOME", str(looked / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return looked
