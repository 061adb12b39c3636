"""Write chosen rules as a recipe says them: groups with patterns, and a scheme for each. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from a1q.engine.pattern import MAX_LENGTH
from a1q.quant.rules import Rule

LONGEST_NAME = 50
"""Of a group, before what is added to it; a recipe allows 64 characters."""
HEAD = """\
# Paste `groups:` into the recipe, and `rules:` into its `quantize` stage in place of `rules: {id}`.
"""


def pinned(rules: Mapping[str, Rule], names: Sequence[str], taken: Iterable[str]) -> dict[str, Any]:
    """`{"groups": {name: {match, expect}}, "rules": {name: scheme}}` that give every module its rule and no other.

    Args:
        rules: one scheme each, in model order.
        names: all modules of the model.
        taken: names that groups of the recipe have already.
    """
    members: dict[tuple[str, str], list[str]] = {}
    schemes: dict[tuple[str, str], Mapping[str, Any]] = {}
    for name, rule in rules.items():
        key = (rule.group, repr(sorted(rule.schemes[0].items())))
        members.setdefault(key, []).append(name)
        schemes[key] = rule.schemes[0]
    used, groups, chosen = set(taken), {}, {}
    for key in sorted(members, key=lambda item: (item[0], schemes[item]["bits"])):
        for match, count in _packed(clauses(members[key], names)):
            bits = str(schemes[key]["bits"]).replace(".", "_")  # names hold no point
            name = _unused(f"{key[0][:LONGEST_NAME]}_{bits}bit", used)
            groups[name] = {"match": match, "expect": count}
            chosen[name] = {"scheme": schemes[key]["scheme"], "bits": schemes[key]["bits"], **schemes[key]}
    return {"groups": groups, "rules": chosen}


def pinned_text(document: Mapping[str, Any], stage_id: str) -> str:
    """The YAML of `pinned`, a line per group and per rule."""
    import yaml

    lines = [HEAD.format(id=stage_id)]
    for key in ("groups", "rules"):
        lines.append(f"{key}:\n")
        for name, value in document[key].items():
            flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
            lines.append(f"  {name}: {flow}")
    return "".join(lines)


def clauses(members: Sequence[str], names: Sequence[str]) -> list[tuple[str, int]]:
    """Patterns, each with how many of `members` it matches, that together match these and no other of `names`.

    Names that differ in their first number share a pattern; so do those with equal numbers and one parent.
    """
    everything = _by_template(names)
    merged: dict[tuple[str, str, str], list[str]] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for (prefix, suffix), numbers in _by_template(members).items():
        every = len(numbers) > 1 and sorted(numbers) == sorted(everything[prefix, suffix])
        parent, _, leaf = suffix.rpartition(".")
        for part in [numbers] if every else _short(numbers):
            key = (prefix, r"\d+" if every else _either([str(number) for number in part]), parent)
            merged.setdefault(key, []).append(leaf)
            counts[key] = counts.get(key, 0) + max(len(part), 1)
    return [
        (re.escape(prefix) + number + re.escape(f"{parent}." if parent else "") + _leaves(leaves), counts[key])
        for key, leaves in merged.items()
        for prefix, number, parent in [key]
    ]


def _by_template(names: Iterable[str]) -> dict[tuple[str, str], list[int]]:
    """(what stands before the first number, what stands behind it) -> the numbers; none where a name has none."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in names:
        digits = re.search(r"(?<=\.)\d+(?=\.)", name)
        if digits is None:
            found.setdefault(("", name), [])
        else:
            found.setdefault((name[: digits.start()], name[digits.end() :]), []).append(int(digits.group()))
    return found


def _short(numbers: list[int]) -> list[list[int]]:
    """The numbers in parts that a pattern has room for."""
    most = MAX_LENGTH // 8
    return [numbers[i : i + most] for i in range(0, len(numbers), most)] or [[]]


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"({'|'.join(options)})" if options else ""


def _leaves(leaves: Sequence[str]) -> str:
    """`(gate|up|down)_proj`: what the names have in common at their end stands once."""
    if len(leaves) == 1:
        return re.escape(leaves[0])
    ends = {leaf[leaf.rfind("_") :] if "_" in leaf else "" for leaf in leaves}
    common = ends.pop() if len(ends) == 1 else ""
    heads = [re.escape(leaf.removesuffix(common)) for leaf in leaves]
    return _either(heads) + re.escape(common)


def _packed(parts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Patterns joined by `|` as long as they stay within what a pattern may have."""
    packed: list[tuple[str, int]] = []
    for pattern, count in parts:
        if packed and len(packed[-1][0]) + 1 + len(pattern) <= MAX_LENGTH:
            packed[-1] = (f"{packed[-1][0]}|{pattern}", packed[-1][1] + count)
        else:
            packed.append((pattern, count))
    return packed


def _unused(name: str, used: set[str]) -> str:
    number, found = 1, name
    while found in used:
        number += 1
        found = f"{name}_{number}"
    used.add(found)
    return found
