"""The shipped demo recipe, shortened, as a subprocess: what the end-to-end tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.tiny import tiny_folder

RECIPE = Path(__file__).parent.parent / "recipes" / "q4_to_q2.yaml"
SHORT = {
    "data.text.seq_len": 32,
    "groups.mlp.expect": 6,
    "stages.teacher.cache": "{top_k: 16, random_negatives: 16, sequences: 24, tune_sequences: 4, shard_sequences: 8}",
    "stages.calibrate.sequences": 16,
    "stages.q4_train.steps": 4,
    "stages.q2.reconstruct.steps": 3,
    "stages.q4_train.batch.sequences": 4,
    "stages.q2_train.steps": 4,
    "stages.q2_train.batch.sequences": 4,
    "stages.recover.steps": 3,
    "stages.recover.refit_steps": 2,
    "stages.recover.batch.sequences": 4,
    "stages.check.sequences": 8,
    "stages.check.gate": "{}",
    "stages.ane.context": 128,
    "stages.ane.verify": "{prompt: 12, generate: 4, random: 8, min_cosine: 0.999}",
    "stages.anemll.context": 128,
    "stages.anemll.verify": "{prompt: 12, generate: 4, random: 8, min_cosine: 0.999}",
}
"""Enough of everything that each stage does its work, on a model of two layers."""


def model_folder(folder: Path) -> Path:
    """A tiny model that Core ML export accepts."""
    return tiny_folder(folder, head_dim=32)


def command(model: Path, out: Path, changes: Mapping[str, Any] | None = None, *flags: str) -> list[str]:
    """The command line of a shortened demo run."""
    settings = {"model.source": model, **SHORT, **(changes or {})}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "a1q", "run", str(RECIPE), "-o", str(out), *sets, *flags]


def environment(home: Path) -> dict[str, str]:
    """This process's environment with a store of its own."""
    return {**os.environ, "A1Q_HOME": str(home), "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run to the end; the caller looks at the exit code."""
    return subprocess.run(arguments, env=environment(home), capture_output=True, text=True, check=False)


def run_until(arguments: list[str], home: Path, stop: Callable[[Mapping[str, Any]], bool]) -> int | None:
    """Run with `--json` and kill -9 at the first event for which `stop` is true.

    Returns:
        The exit code if the run ended by itself, None if it was killed.
    """
    process = subprocess.Popen([*arguments, "--json"], env=environment(home), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if stop(json.loads(line)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            return None
    return process.wait()


def digests(out: Path) -> dict[str, str]:
    """Stage id -> digest of the artifact it ended with."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return {event["id"]: event["digest"] for event in events if event["event"] == "stage_end"}


def report(out: Path) -> dict[str, Any]:
    """The run's report."""
    return json.loads((out / "report.json").read_text())  # type: ignore[no-any-return]
