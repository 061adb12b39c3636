"""One run in two processes, by the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.support import ROOT, process, report

RECIPE = """\
a1q: 1
name: launch
seed: 3
model: {source: "builtin:pico"}
data: {text: {source: "builtin:prose", seq_len: 32}}
groups:
  mlp: {match: 'model\\.layers\\.\\d+\\.mlp\\.(gate|up|down)_proj'}
stages:
  - id: teacher
    kd: {data: text, cache: {top_k: 16, random_negatives: 16, sequences: 32, tune_sequences: 8, shard_sequences: 8}}
  - id: quantized
    quantize: {rules: {mlp: {scheme: lut_lowrank, bits: 4, rounds: 1}}, rest: keep}
  - id: trained
    train: {objective: {kd: teacher}, steps: 200, batch: {sequences: 4}, evaluate_every: 100, trainable: [scales]}
"""


def digests(run: Path) -> dict[str, str]:
    return {stage["id"]: stage["digest"] for stage in report(run)["stages"]}


@pytest.mark.slow
def test_two_processes_stop_resume_and_say_what_one_says(tmp_path: Path) -> None:
    recipe, alone, run = tmp_path / "launch.yaml", tmp_path / "alone", tmp_path / "run"
    recipe.write_text(RECIPE)
    first = process("run", recipe, "-o", alone, "--until", "teacher", home=tmp_path / "home1")
    assert first.returncode == 0, first.stderr
    command = ["run", str(recipe), "-o", str(run), "--launch", "2"]
    environment = {**os.environ, "A1Q_HOME": str(tmp_path / "home2")}
    started = subprocess.Popen(
        [sys.executable, "-m", "a1q", *command], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    curve, deadline = run / "metrics" / "trained.jsonl", time.monotonic() + 100
    while not (curve.exists() and len(curve.read_text().splitlines()) >= 3) and time.monotonic() < deadline:
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=60) == 143
    assert started.stdout is not None and "interrupted" in started.stdout.read()
    assert report(run)["status"] == "interrupted"
    again = process(*command, home=tmp_path / "home2")
    assert again.returncode == 0, again.stderr
    assert "resumed at step" in again.stdout
    assert digests(run)["teacher"] == digests(alone)["teacher"], "shards are the same bytes, whoever writes them"
    steps = [json.loads(line)["step"] for line in curve.read_text().splitlines()]
    assert steps == list(range(1, 201))


def test_wrong_environments_and_wrong_recipes_start_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "launch.yaml"
    recipe.write_text(RECIPE.replace("sequences: 4}", "sequences: 400}"))
    found = process("run", recipe, "-o", tmp_path / "run", "--launch", "2", home=tmp_path / "home")
    assert found.returncode == 2
    assert found.stderr.count("a step reads 400 x 1 sequences, and the teacher cache has 32") == 1
    assert not (tmp_path / "run").exists()
    command = [sys.executable, "-m", "a1q", "run", str(recipe)]
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    half = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert half.returncode == 2
    assert "not which this is" in half.stderr and "Traceback" not in half.stderr
