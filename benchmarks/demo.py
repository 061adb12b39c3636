"""The demo recipe from an empty store, then again fully cached: `python -m benchmarks.demo`.

Prints what each stage took and what the result measures against the limits the product sets itself; exits 1 if one
is missed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, save

RECIPE = "recipes/q4_to_q2.yaml"


def run(out: Path, home: Path) -> tuple[float, dict[str, Any]]:
    """Wall seconds of one `a1q run` in a fresh process, and its report."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "a1q", "run", RECIPE, "-o", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "A1Q_HOME": str(home)}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, json.loads((out / "report.json").read_text())


def main() -> None:
    """Run, print, compare."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, report = run(Path(folder) / "first", Path(folder) / "home")
        cached_seconds, cached = run(Path(folder) / "second", Path(folder) / "home")
    if any(stage["cache"] != "hit" for stage in cached["stages"]):
        raise SystemExit("the second run was not fully cached")
    metrics = {stage["id"]: stage["metrics"] for stage in report["stages"]}
    check, package = metrics["check"], metrics["ane"]
    stages = [[stage["id"], stage["stage"], f"{stage['seconds']:.1f}"] for stage in report["stages"]]
    print_table("Stages of the demo", ["id", "stage", "seconds"], stages)
    rows: list[tuple[str, float, str, float]] = [
        ("demo, seconds", seconds, "<=", 240),
        ("the same, fully cached, seconds", cached_seconds, "<=", 5),
        ("KL to the teacher, nats per token", check["kl"], "<=", 0.02),
        ("perplexity over the teacher's", check["ppl"] / check["teacher_ppl"], "<=", 1.03),
        ("top-1 agreement", check["top1"], ">=", 0),
        ("bits per weight", check["bpw"], "<=", 3.0),
        ("bits per parameter, whole model", check["bpw_model"], ">=", 0),
        ("KL of the 4-bit start", metrics["q4_train"]["kl_before"], ">=", 0),
        ("KL at 4 bits, trained", metrics["q4_train"]["kl_after"], ">=", 0),
        ("KL converted to 2 bits", metrics["q2"]["kl_after"], ">=", 0),
        ("KL at 2 bits, trained", metrics["q2_train"]["kl_after"], ">=", 0),
        ("KL with the adapter", metrics["recover"]["kl_adapter"], ">=", 0),
        ("Core ML, fp32: least cosine to PyTorch", package["cosine_fp32"], ">=", 0.9999),
        ("Core ML, fp32: greedy tokens equal", package["greedy_agreement_fp32"], ">=", 1.0),
        ("Core ML, fp16: least cosine to PyTorch", package["cosine_fp16"], ">=", 0),
        ("Core ML, fp16: greedy tokens equal", package["greedy_agreement_fp16"], ">=", 0),
        ("Core ML, weight file over theory", package["size_ratio"], "<=", 1.03),
    ]
    table = [
        [name, f"{value:.5g}", f"{sign} {limit}" if sign == "<=" or limit else ""] for name, value, sign, limit in rows
    ]
    print_table("Result of the demo (KL of single stages: held-out tune side)", ["what", "figure", "limit"], table)
    stages_kept = [{name: stage[name] for name in ("id", "stage", "seconds", "metrics")} for stage in report["stages"]]
    save("demo", {"stages": stages_kept, "result": {name: value for name, value, _, _ in rows}})
    missed = [name for name, value, sign, limit in rows if (value > limit if sign == "<=" else value < limit)]
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
