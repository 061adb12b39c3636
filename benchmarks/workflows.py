"""Every shipped workflow against itself as published: `python -m benchmarks.workflows [--only NAME] [--table]`.

A row is a shipped recipe on the built-in model with some of its parts as first published for this family of methods
(the start, the conversion, the loss); each row takes one of them back, and the last is the recipe as shipped. Bits,
data, batch and steps of training are equal within a workflow. KL to the teacher and cross-entropy are those of the test
side, which nothing was chosen by. Rows are runs of `a1q` in a store of its own that is kept ($A1Q_HOME, or
benchmarks' own).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, print_table, save

LOSS = "kd: teacher, temperature: 2, tail: candidates"
"""The published one: softmaxes over the top-k alone."""


@dataclass(frozen=True)
class Factor:
    """One part of a recipe, and how it was published."""

    name: str
    sets: tuple[str, ...] = ()
    unsets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workflow:
    """A recipe and its factors, in the order in which they are taken back."""

    recipe: str
    factors: tuple[Factor, ...]
    target: float = 1.0
    """The last row's KL over the first one's, at most."""


def loss(hard: dict[str, str]) -> Factor:
    """The published objective of stages, each with the hard labels it was published with."""
    return Factor("loss", tuple(f"stages.{stage}.objective={{{LOSS}, {labels}}}" for stage, labels in hard.items()))


def mixed(hard: dict[str, str]) -> Factor:
    """The published loss of layers by themselves: half the layer's own error, half the whole model's divergence.

    The divergence was of a cache's candidates; beside `local`, whose states no cache holds, it is of all.
    """
    terms = "kd: teacher, online: true, temperature: 2, kl: 0.5, local: 0.5"
    return Factor("loss", tuple(f"stages.{stage}.objective={{{terms}{labels}}}" for stage, labels in hard.items()))


SCALES, WEIGHTS = "hard_full: 0.0005", "hard_top1: 0.1, hard_full: 0.0005"
"""Hard labels of the scripts that train scales first, then weights."""
FACTORED = "hard_top1: 0.2, hard_full: 0.00005"
"""Those of the script that trains the factored form."""
STAGED = loss({"scales": SCALES, "weights": WEIGHTS, "both": WEIGHTS})
WORKFLOWS = (
    Workflow(
        "q4",
        (
            Factor("start", ("stages.start.rules.linears.fit=absmax_svd",)),
            STAGED,
        ),
    ),
    Workflow(
        "q2",
        (
            Factor("start", ("stages.start.rules.linears.fit=absmax_svd",), ("stages.start.reconstruct",)),
            STAGED,
        ),
        target=0.7,
    ),
    Workflow(
        "q4_to_q2",
        (
            Factor("start", ("stages.q4.rules.mlp.fit=absmax_svd", "stages.q4.rules.attn.fit=absmax_svd")),
            Factor("conversion", ("stages.q2.method=published",), ("stages.q2.reconstruct", "stages.q2.compare")),
            loss({"q4_train": FACTORED, "q2_train": FACTORED, "recover": FACTORED}),
        ),
        target=0.7,
    ),
    Workflow(
        "v1_to_v2",
        (
            Factor("start", ("stages.start.rules.mlp.fit=absmax_svd", "stages.start.rules.attn.fit=absmax_svd")),
            Factor("conversion", ("stages.v2.method=published",)),
            loss({"v1": WEIGHTS, "v2_train": FACTORED}),
        ),
        target=0.7,
    ),
    Workflow(
        "v2_scratch",
        (
            Factor("start", ("stages.start.rules.mlp.fit=absmax_svd", "stages.start.rules.attn.fit=absmax_svd")),
            Factor("what trains", ("stages.v2.trainable=[scales]",)),
            loss({"v2": FACTORED}),
        ),
    ),
    Workflow(
        "layerwise",
        (
            Factor("start", ("stages.q2a4.rules.mlp.fit=absmax_svd", "stages.q2a4.rules.attn.fit=absmax_svd")),
            mixed({"scales": "", "weights": ", hard_top1: 0.1"}),
        ),
    ),
    Workflow(
        "progressive",
        (
            Factor("start", ("stages.q2a4.rules.mlp.fit=absmax_svd", "stages.q2a4.rules.attn.fit=absmax_svd")),
            mixed({"mlps": ", hard_top1: 0.1", "attention": ", hard_top1: 0.1"}),
        ),
    ),
    Workflow(
        "apple_2bit",
        (
            Factor("start", ("stages.q2.rules.linears.fit=percentile",)),
            Factor("loss", ("stages.qat.objective={kd: teacher, kl: 0, hard_full: 1}",)),
        ),
    ),
)


def rows(workflow: Workflow) -> Iterator[tuple[str, list[str]]]:
    """(label, arguments of `a1q run`) from all as published to all ours."""
    for taken in range(len(workflow.factors) + 1):
        left = workflow.factors[taken:]
        ours = [factor.name for factor in workflow.factors[:taken]]
        label = "as published" if not ours else "ours" if not left else f"our {', '.join(ours)}"
        sets = [item for factor in left for value in factor.sets for item in ("--set", value)]
        unsets = [item for factor in left for value in factor.unsets for item in ("--unset", value)]
        yield label, [*sets, *unsets]


def measure(recipe: str, arguments: Sequence[str], home: Path) -> dict[str, Any]:
    """Run up to the stage `check`, gates aside, and return what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "a1q", "run", f"recipes/{recipe}.yaml", "--only", "check", "-o", str(out)]
        command += [*arguments, "--unset", "stages.check.gate"]
        subprocess.run(command, check=True, env={**os.environ, "A1Q_HOME": str(home)}, stdout=subprocess.DEVNULL)
        report = json.loads((out / "report.json").read_text())
    metrics = {stage["id"]: stage["metrics"] for stage in report["stages"] if stage.get("metrics")}
    check = metrics["check"]
    return {
        "kl": check["kl"],
        "cross_entropy": math.log(check["ppl"]),
        "teacher_cross_entropy": math.log(check["teacher_ppl"]),
        "bpw": check["bpw"],
        "steps": {
            stage: {name: found[name] for name in ("kl_before", "kl_after", "kl_adapter") if name in found}
            for stage, found in metrics.items()
            if "kl_before" in found
        },
    }


def table(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines of the table that is printed and stands in docs/workflows.md."""
    first = {row["workflow"]: row["kl"] for row in reversed(found)}
    return [
        [
            row["workflow"],
            row["row"],
            f"{row['bpw']:.3f}",
            f"{row['kl']:.5f}",
            f"{row['kl'] / first[row['workflow']]:.2f}",
            f"{row['cross_entropy']:.4f}",
            "; ".join(f"{stage} {_change(steps)}" for stage, steps in row["steps"].items()),
        ]
        for row in found
    ]


def _change(steps: dict[str, float]) -> str:
    after = steps.get("kl_adapter", steps.get("kl_after", math.nan))
    return f"{steps['kl_before']:.4f} to {after:.4f}"


def main() -> int:
    """Measure what is asked for, keep the rest of the results, print; 1 where a target is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.workflows")
    parser.add_argument("--only", choices=[workflow.recipe for workflow in WORKFLOWS], nargs="+")
    parser.add_argument("--table", action="store_true", help="only print what was measured before")
    given = parser.parse_args()
    path = RESULTS / "workflows.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    home = Path(os.environ.get("A1Q_HOME", Path.home() / ".cache" / "a1q" / "workflows"))
    for workflow in () if given.table else WORKFLOWS:
        if given.only and workflow.recipe not in given.only:
            continue
        known = [row for row in known if row["workflow"] != workflow.recipe]
        for label, arguments in rows(workflow):
            known.append({"workflow": workflow.recipe, "row": label, **measure(workflow.recipe, arguments, home)})
            print(json.dumps(known[-1]), file=sys.stderr, flush=True)
        save("workflows", known)
    order = [workflow.recipe for workflow in WORKFLOWS]
    known.sort(key=lambda row: order.index(row["workflow"]))
    header = ["workflow", "row", "bits per weight", "KL", "over published", "cross-entropy", "held-out KL by stage"]
    print_table("Workflows on the built-in model, test side", header, table(known))
    missed = [
        workflow.recipe
        for workflow in WORKFLOWS
        for kls in [[row["kl"] for row in known if row["workflow"] == workflow.recipe]]
        if kls and kls[-1] > workflow.target * kls[0]
    ]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
