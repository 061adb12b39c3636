"""Recipes on the numbers plug-in, run by the real command line in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing

PLUGIN = Path(__file__).with_name("numbers.py")
ROOT = Path(__file__).resolve().parents[2]

RECIPE = """\
a1q: 1
name: numbers
seed: 7
stages:
  - begin: {value: 1}
  - id: more
    add: {value: 2}
  - id: check
    limit: {most: 100}
  - id: box
    ship: {}
"""


def a1q(*arguments: object) -> click.testing.Result:
    """Run the command line in this process; errors are printed and turned into exit codes as always."""
    from unittest.mock import patch

    from a1q.cli import main

    runner = click.testing.CliRunner()

    def entry(*_: object) -> None:
        main([str(item) for item in arguments])

    command = click.Command("a1q", callback=entry)
    with patch.object(sys, "argv", ["a1q"]):
        return runner.invoke(command, [])


def process(*arguments: object, home: Path, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "A1Q_HOME": str(home)}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    command = [sys.executable, "-m", "a1q", *(str(item) for item in arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)


def report(run: Path) -> dict[str, Any]:
    """report.json of a run folder."""
    return json.loads((run / "report.json").read_text())


def caches(run: Path) -> list[str]:
    """Hit or miss, stage by stage."""
    return [item["cache"] for item in report(run)["stages"]]
