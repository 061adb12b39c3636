"""What training costs beside plain fine-tuning: `python -m benchmarks.training [--rounds N] [--only TEXT]`.

Every side of a ratio is measured in a process of its own, the sides in turn; a side's figure is the least of its
rounds. `--device cuda` measures there. Both sides have the same master type (fp32), autocast, checkpointing, head and
loss. Memory is the process's peak above what it was after the imports. bf16 rows are there where the processor has bf16
instructions, and on CUDA.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, print_table, save


@dataclass(frozen=True)
class Side:
    """One side of a ratio: the arguments of `linears_step` or `model_step` in benchmarks/training/sides.py."""

    what: str
    side: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the table: `ours` over `theirs` (`seconds` or `bytes`), and what is to be reached."""

    name: str
    figure: str
    ours: Side
    theirs: Side
    target: str
    steps: int = 4
    types: tuple[str, ...] = ("fp32", "bf16")


WHOLE, RANKS = {"layers": 4}, {"layers": 1, "ranks": (32, 8)}
FULL, AGAIN = {"layers": 28}, {"layers": 28, "recompute": True}
ROWS = (
    Row(
        "linears, scales only ÷ plain",
        "seconds",
        Side("linears", "scales", {"layers": 2}),
        Side("linears", "plain", {"layers": 2}),
        "<= 0.75",
    ),
    Row(
        "linears, scales + LUT ÷ plain",
        "seconds",
        Side("linears", "scales, lut", {"layers": 2}),
        Side("linears", "plain", {"layers": 2}),
        "",
    ),
    Row(
        "linears, weights + scales ÷ plain",
        "seconds",
        Side("linears", "weights, scales", {"layers": 2}),
        Side("linears", "plain", {"layers": 2}),
        "",
    ),
    Row(
        "4 layers + head, scales only ÷ plain",
        "seconds",
        Side("model", "scales", WHOLE),
        Side("model", "plain", WHOLE),
        "",
    ),
    Row(
        "4 layers + head, scales + LUT ÷ plain",
        "seconds",
        Side("model", "scales, lut", WHOLE),
        Side("model", "plain", WHOLE),
        "<= 1.15",
    ),
    Row(
        "4 layers + head, weights + scales ÷ plain",
        "seconds",
        Side("model", "weights, scales", WHOLE),
        Side("model", "plain", WHOLE),
        "<= 1.25",
    ),
    Row(
        "4 layers + head, weights + scales + LUT ÷ plain",
        "seconds",
        Side("model", "weights, scales, lut", WHOLE),
        Side("model", "plain", WHOLE),
        "",
    ),
    Row(
        "factored (ranks 32/8) ÷ dense, scales + LUT",
        "seconds",
        Side("linears", "scales, lut", {**RANKS, "form": "factored"}),
        Side("linears", "scales, lut", RANKS),
        ">= 14",
        steps=2,
        types=("fp32",),
    ),
    Row(
        "28 layers, memory: scales only ÷ all plain, AdamW",
        "bytes",
        Side("model", "scales", FULL),
        Side("model", "plain", {**FULL, "everything": True}),
        "<= 0.30",
        steps=1,
        types=("fp32",),
    ),
    Row(
        "the same, layers computed again",
        "bytes",
        Side("model", "scales", AGAIN),
        Side("model", "plain", {**AGAIN, "everything": True}),
        "",
        steps=1,
        types=("fp32",),
    ),
)


def types_here(device: str) -> tuple[str, ...]:
    """Types whose products the device makes by instructions of its own."""
    if device == "cuda":
        return ("fp32", "bf16")
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    return ("fp32", "bf16") if "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags else ("fp32",)


def measure(side: Side, device: str, kind: str, steps: int) -> dict[str, float]:
    """In a process of its own."""
    asked = json.dumps(
        {"what": side.what, "side": side.side, "device": device, "kind": kind, "steps": steps, **side.more}
    )
    command = [sys.executable, "-m", "benchmarks.training", "--one", asked]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def one(asked: dict[str, Any]) -> None:
    """What a process of its own does."""
    from benchmarks.training import sides

    what, device, steps = asked.pop("what"), asked["device"], asked.pop("steps")
    prepare = sides.linears_step if what == "linears" else sides.model_step
    if "ranks" in asked:
        asked["ranks"] = tuple(asked["ranks"])
    print(json.dumps(sides.measured(device, steps, lambda: prepare(**asked))))


def _others(name: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier run with `--only` that this one has not measured."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    new = {(row["row"], row["type"]) for row in found}
    return [row for row in rows if isinstance(row, dict) and (row.get("row"), row.get("type")) not in new]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one")
    given = parser.parse_args()
    if given.one:
        return one(json.loads(given.one))
    found: list[dict[str, Any]] = []
    for row in ROWS:
        if given.only not in row.name:
            continue
        for kind in (kind for kind in types_here(given.device) if kind in row.types):
            rounds = given.rounds if row.figure == "seconds" else 1
            pairs = [
                [measure(side, given.device, kind, row.steps)[row.figure] for side in (row.ours, row.theirs)]
                for _ in range(rounds)
            ]
            ours, theirs = (min(pair[number] for pair in pairs) for number in (0, 1))
            ratios = [ours_ / theirs_ for ours_, theirs_ in pairs]
            found.append(
                {
                    "row": row.name,
                    "type": kind,
                    "figure": row.figure,
                    "ours": ours,
                    "theirs": theirs,
                    "ratio": ours / theirs,
                    "least": min(ratios),
                    "most": max(ratios),
                    "target": row.target,
                }
            )
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    name = "training" if given.device == "cpu" else f"training_{given.device}"
    save(name, [*_others(name, found), *found])
    lines = [
        [
            item["row"],
            item["type"],
            *(
                f"{item[key]:.3f} s" if item["figure"] == "seconds" else f"{item[key] / 2**30:.2f} GiB"
                for key in ("ours", "theirs")
            ),
            f"{item['ratio']:.3f}",
            f"{item['least']:.3f} to {item['most']:.3f}",
            item["target"],
        ]
        for item in found
    ]
    print_table(
        "Training steps of 4 x 128 tokens", ["what", "type", "ours", "theirs", "ratio", "rounds", "target"], lines
    )


if __name__ == "__main__":
    main()
