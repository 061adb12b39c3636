"""Which modules a stage's rules mean: named groups of the recipe, matched against a model's module names.

The contract: a group's `match` is a regex that must match a module's whole name. Within one stage a module belongs to
at most one rule, every rule matches at least one module, and a group's `expect` is met exactly; anything else is a
problem that lists the names nearby, never a model left silently as it was. Modules that no rule names are the
business of the stage (`rest:`). A tied head is one parameter, so a pattern for `lm_head` finds nothing and is told to
name `model.embed_tokens`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from a1q.engine.pattern import compile_pattern
from a1q.engine.stage import Group, PlanContext
from a1q.models.view import ModelView


def resolve_rules(ctx: PlanContext, rules: Iterable[str], path: str, view: ModelView) -> dict[str, str]:
    """Resolve the groups named by `rules` to modules of `view`; record every problem in `ctx`.

    Args:
        ctx: where problems go, and whose `used_groups` grows.
        rules: group names: a mapping by group name (`rules: {mlp: {...}}`) or a list (`groups: [mlp]`).
        path: dotted path of `rules` inside the stage's options.

    Returns:
        Module name -> group name, in model order. Modules of rules with problems may be missing.
    """
    owners: dict[str, list[str]] = {}
    for index, name in enumerate(rules):
        place = f"{path}.{name}" if isinstance(rules, Mapping) else f"{path}.{index}"
        group = ctx.groups.get(name)
        if group is None:
            ctx.recipe_problem(place, f"there is no group {name!r} under `groups:`", _near_group(name, ctx.groups))
            continue
        ctx.used_groups.add(name)
        found = matching(group, view)
        if not found:
            ctx.mismatch(place, f"group {name!r} matches no module: {group.match}", near_modules(group, view))
        elif group.expect is not None and len(found) != group.expect:
            ctx.mismatch(
                place,
                f"group {name!r} expects {group.expect} modules and matches {len(found)}",
                f"it matches {', '.join(summarize(found))}",
            )
        for module in found:
            owners.setdefault(module, []).append(name)
    for pair, modules in _overlaps(owners).items():
        second = pair[-1]
        place = f"{path}.{second}" if isinstance(rules, Mapping) else f"{path}.{list(rules).index(second)}"
        named = " and ".join(repr(name) for name in pair)
        ctx.mismatch(
            place, f"{len(modules)} modules are in {named}; each may be in one rule", ", ".join(summarize(modules))
        )
    return {module: owners[module][0] for module in view.modules if module in owners}


def matching(group: Group, view: ModelView) -> list[str]:
    """Names of the modules whose whole name matches the group's pattern, in model order."""
    pattern = compile_pattern(group.match)
    return [name for name in view.modules if pattern.fullmatch(name)]


def summarize(names: Iterable[str], limit: int = 8) -> list[str]:
    """Fold names that differ in one number: `model.layers.{0..3}.mlp.up_proj`.

    At most `limit` entries, then one that counts the rest.
    """
    numbers: dict[str, list[int]] = {}
    for name in names:
        digits = re.search(r"(?<=\.)\d+(?=\.)", name)
        shape = name if digits is None else f"{name[: digits.start()]}\0{name[digits.end() :]}"
        numbers.setdefault(shape, []).extend([] if digits is None else [int(digits.group())])
    folded = [shape.replace("\0", _ranges(found)) for shape, found in numbers.items()]
    if len(folded) > limit:
        folded = [*folded[:limit], f"and {len(folded) - limit} more"]
    return folded


def _ranges(numbers: list[int]) -> str:
    """`{0..3,7}` for [0, 1, 2, 3, 7]; a lone number stands as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(low) if low == high else f"{low}..{high}" for low, high in runs) + "}"


def _overlaps(owners: Mapping[str, list[str]]) -> dict[tuple[str, ...], list[str]]:
    overlaps: dict[tuple[str, ...], list[str]] = {}
    for module, names in owners.items():
        if len(names) > 1:
            overlaps.setdefault(tuple(names), []).append(module)
    return overlaps


def _near_group(name: str, groups: Mapping[str, Group]) -> str:
    near = difflib.get_close_matches(name, groups, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"groups of this recipe: {', '.join(groups)}" if groups else "this recipe has no groups"


def near_modules(group: Group, view: ModelView) -> str:
    """What a user who meant other modules may want to read: the names nearest to the group's pattern."""
    if view.tied and compile_pattern(group.match).fullmatch("lm_head"):
        return "this model's head is tied to its embedding: they are one parameter, model.embed_tokens"
    plain = re.sub(r"\\(.)", r"\1", group.match.replace(r"\d+", "{}"))
    shapes = {re.sub(r"\{[^}]*\}|(?<=\.)\d+(?=\.)", "{}", name): name for name in summarize(view.modules, 1000)}
    near = difflib.get_close_matches(plain, shapes, 4, cutoff=0.0)
    return f"names nearby: {', '.join(shapes[shape] for shape in near)}"
