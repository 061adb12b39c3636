"""What LoRA recovery brings at two bits: `python -m benchmarks.recovery [--set PATH=VALUE]... [--table]`.

One run of benchmarks/recovery.yaml: from one trained model, equally many steps of plain training, of adapters that are
kept, and of adapters that are merged into the grid. KL to the teacher and cross-entropy are those of the test side,
which nothing was chosen by.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, print_table, save

RECIPE = Path(__file__).with_suffix(".yaml")
LABELS = {
    "trained": "before",
    "plain": "plain training",
    "random": "adapters from nothing, kept",
    "refit": "the same merged by a refit, and 40 steps of that",
    "error": "adapters from what quantizing lost, kept",
}
"""Stage of the recipe -> row."""
RECOVERED, KEPT = 0.8, 0.5
"""Targets: KL of adapters over that of plain training, at most; share of their gain left by a merge, at least."""


def measure(sets: Sequence[str]) -> list[dict[str, Any]]:
    """Run the recipe and return a row per stage."""
    home = os.environ.get("A1Q_HOME", str(Path.home() / ".cache" / "a1q" / "workflows"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [word for item in sets for word in ("--set", item)]
        command = [sys.executable, "-m", "a1q", "run", str(RECIPE), "-o", str(out), *words]
        subprocess.run(command, check=True, env={**os.environ, "A1Q_HOME": home}, stdout=subprocess.DEVNULL)
        report = json.loads((out / "report.json").read_text())
    metrics = {stage["id"]: stage["metrics"] for stage in report["stages"]}
    return [
        {
            "row": label,
            "kl": metrics[f"of_{stage}"]["kl"],
            "cross_entropy": math.log(metrics[f"of_{stage}"]["ppl"]),
            "bpw": metrics[f"of_{stage}"]["bpw"],
            "held_out": {name: value for name, value in metrics[stage].items() if name.startswith("kl_")},
        }
        for stage, label in LABELS.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of the table that is printed and stands in docs/workflows.md."""
    before, plain = rows[0]["kl"], rows[1]["kl"]
    return [
        [
            row["row"],
            f"{row['bpw']:.3f}",
            f"{row['kl']:.5f}",
            f"{row['kl'] / before:.3f}",
            f"{row['kl'] / plain:.3f}",
            f"{row['cross_entropy']:.4f}",
        ]
        for row in rows
    ]


def main() -> int:
    """Measure, print; 1 where a target is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.recovery")
    parser.add_argument("--set", action="append", default=[], help="as of `a1q run`; results are then not saved")
    parser.add_argument("--table", action="store_true", help="only print what was measured before")
    given = parser.parse_args()
    if given.table:
        rows = json.loads((RESULTS / "recovery.json").read_text())["rows"]
    else:
        rows = measure(given.set)
        if not given.set:
            save("recovery", rows)
    header = ["from one model, 40 steps of", "bits per weight", "KL", "over before", "over plain training"]
    print_table("Recovery at two bits, built-in model, test side", [*header, "cross-entropy"], table(rows))
    before, plain, random, refit, error = (row["kl"] for row in rows)
    missed = []
    if min(random, error) > RECOVERED * plain:
        missed.append(f"adapters end at {min(random, error) / plain:.3f} of plain training, wanted {RECOVERED}")
    if before - refit < KEPT * (before - random):
        missed.append(f"the merge keeps {(before - refit) / (before - random):.2f} of their gain, wanted {KEPT}")
    print("\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
