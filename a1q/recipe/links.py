"""Connect stages: which earlier stage, data entry or model each input of a stage means. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from a1q.engine.plan import SOURCE
from a1q.recipe.paths import Path, suggest
from a1q.recipe.recipe import Reference
from a1q.recipe.schema import Finding

SOURCES = ("model", "adapter")
"""Artifact kinds that a `{source: ...}` mapping may name in a stage's options."""
NO_MODEL = "the recipe has no `model:`"
"""Part of every finding that is owed to a missing model."""


@dataclass(frozen=True)
class Producer:
    """What a stage makes, known from its schema alone."""

    id: str
    """Empty for a stage that has no `id` and can't be read: it may be the one that a later stage refers to."""
    kind: str
    """Artifact kind, or an empty string where the stage itself could not be read."""


@dataclass(frozen=True)
class Surroundings:
    """What a stage can refer to."""

    producers: Sequence[Producer]
    """All stages, in order."""
    index: int
    """This stage's position among them."""
    has_model: bool
    """Whether the recipe has a `model:`."""
    data: Sequence[str]
    """Names of the data entries."""

    def nearest(self, kind: str) -> str | None:
        """Id of the nearest earlier stage that makes `kind`."""
        return next((item.id for item in reversed(self.producers[: self.index]) if item.kind == kind), None)


def option(options: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted path inside a stage's options, or None."""
    value: Any = options
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def link_inputs(
    about: Mapping[str, Any], options: Mapping[str, Any], written_from: str | None, around: Surroundings
) -> tuple[dict[str, Reference], list[Finding]]:
    """Resolve every input that a stage's `x-a1q` block declares.

    Args:
        about: the schema's `x-a1q` block.
        options: the stage's default-filled options.
        written_from: its `from`, if there is one.
        around: what it can refer to.

    Returns:
        The references by input name, and findings whose paths start at the options (`("from",)` for `from`).
    """
    inputs: dict[str, Reference] = {}
    findings: list[Finding] = []
    declared = about.get("inputs", {})
    if written_from is not None and not any(item["at"] == "from" for item in declared.values()):
        findings.append(Finding(("from",), "this stage takes no `from`"))
    for name, spec in declared.items():
        at_from = spec["at"] == "from"
        written = written_from if at_from else option(options, spec["at"])
        path: Path = tuple(spec["at"].split("."))
        if isinstance(written, str):
            problem = _check(written, spec["kind"], path, around)
            inputs[name] = None if problem else written
            findings += [problem] if problem else []
        elif isinstance(written, Mapping) and spec["kind"] in SOURCES:
            inputs[name] = written
        else:
            inputs[name], missing = _default(name, spec, around)
            maker = around.nearest(spec["kind"])
            hint = f"write `{spec['at']}: {maker}` to take the model of an earlier stage" if maker else ""
            findings += [Finding(() if at_from else path, missing, hint)] if missing else []
    return inputs, findings


def link_data(
    about: Mapping[str, Any], options: Mapping[str, Any], around: Surroundings
) -> tuple[list[str], list[Finding]]:
    """Resolve the options that name a data entry."""
    names: list[str] = []
    findings: list[Finding] = []
    for dotted in about.get("data", ()):
        name = option(options, dotted)
        if name is None:
            continue
        if name in around.data:
            names.append(name)
        else:
            hint = suggest(name, around.data, "entries") or "this recipe has no `data:`"
            findings.append(Finding(tuple(dotted.split(".")), f"there is no entry {name!r} under `data:`", hint))
    return names, findings


def _check(written: str, kind: str, path: Path, around: Surroundings) -> Finding | None:
    """Why a written reference can't be followed, if it can't."""
    if written == SOURCE:
        if kind != "model":
            return Finding(path, f"expected a stage that makes a {kind}, found the recipe's `model:`")
        return None if around.has_model else Finding(path, NO_MODEL)
    earlier = around.producers[: around.index]
    for item in earlier:
        if item.id == written:
            if item.kind in (kind, ""):
                return None
            hint = suggest("", [other.id for other in earlier if other.kind == kind], f"stages that make a {kind}")
            return Finding(path, f"expected a stage that makes a {kind}; {written!r} makes a {item.kind}", hint)
    if written == around.producers[around.index].id:
        return Finding(path, f"stage {written!r} can't take its own result")
    if any(item.id == written for item in around.producers):
        return Finding(path, f"stage {written!r} comes later; a stage takes results of earlier ones", "move it up")
    if any(not item.id for item in earlier):
        return None
    fitting = [item.id for item in earlier if item.kind in (kind, "")]
    hint = suggest(written, [*fitting, *([SOURCE] if kind == "model" else [])], f"stages that make a {kind}")
    return Finding(path, f"there is no stage {written!r}", hint)


def _default(name: str, spec: Mapping[str, Any], around: Surroundings) -> tuple[Reference, str]:
    """What an input that the recipe leaves out means, or a message if that is nothing."""
    kind, rule = spec["kind"], spec.get("default")
    optional = bool(spec.get("optional"))
    if rule == "source":
        found = SOURCE if around.has_model else None
    elif spec["at"] == "from" or rule == "nearest" or not optional:
        found = around.nearest(kind)
        if found is None and kind == "model" and around.has_model and not optional:
            found = SOURCE
    else:
        found = None
    if found is not None or optional:
        return found, ""
    if kind == "model":
        return None, f"this stage needs a model, and {NO_MODEL}"
    return None, f"this stage needs a {kind} ({name}), and no earlier stage makes one"
