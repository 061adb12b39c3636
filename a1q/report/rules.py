"""What an `allocate` stage chose, as text, from the rules.json that it left in the run folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from a1q.engine.rundir import read_json
from a1q.report.table import figure, table


def rules_of(folder: Path, stage: Mapping[str, Any]) -> dict[str, Any]:
    """The rules.json of a stage of a report; empty for other stages, and where the file is missing or damaged."""
    if stage.get("kind") != "rules":
        return {}
    found = read_json(folder / "rules" / stage["id"] / "rules.json")
    return found if {"budget", "reached", "kl", "modules"} <= set(found) else {}


def by_group(rules: Mapping[str, Any]) -> str:
    """One line per group, and the sums."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for module in rules["modules"].values():
        groups.setdefault(module["group"], []).append(module)
    rows = []
    for name, modules in groups.items():
        counts = Counter(module["text"] for module in modules)
        chosen = ", ".join(f"{count} x {text}" for text, count in sorted(counts.items()))
        kl = figure(sum(module["kl"] for module in modules))
        rows.append([name, str(len(modules)), f"{_bits_per_weight(modules):.3f}", kl, chosen])
    lines = table(["group", "modules", "bits/weight", "KL, sum", "chosen"], rows, right=(1, 2, 3))
    budget, reached, kl = rules["budget"], rules["reached"], rules["kl"]
    return (
        f"{lines}\n"
        f"{reached['bits_per_param']:.4f} of {budget['bits_per_param']:.4f} bits per parameter, "
        f"{reached['bytes'] / 1e6:.4g} of {budget['bytes'] / 1e6:.4g} MB\n"
        f"KL {figure(kl['predicted'])} predicted, {figure(kl['measured'])} measured with all of it in place; "
        f"no choice within the budget is predicted below {figure(kl['bound'])}"
    )


def by_module(rules: Mapping[str, Any]) -> str:
    """One line per module: what it got, and what every candidate would have done to the model by itself."""
    rows = []
    for name, module in rules["modules"].items():
        others = ", ".join(
            f"{item['bits'] / _weights(module):.2f}: {figure(item['kl'])}" for item in module["candidates"]
        )
        rows.append([name, module["text"], f"{_bits_per_weight([module]):.3f}", figure(module["kl"]), others])
    head = ["module", "chosen", "bits/weight", "KL", "KL of each candidate by its bits per weight"]
    return table(head, rows, right=(2, 3))


def _weights(module: Mapping[str, Any]) -> int:
    return module["shape"][0] * module["shape"][1]


def _bits_per_weight(modules: list[Mapping[str, Any]]) -> float:
    return sum(module["bits"] for module in modules) / sum(map(_weights, modules))
