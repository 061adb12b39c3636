"""What a recipe is, once its text has been checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1q.engine.stage import Group
from a1q.errors import Problem
from a1q.recipe import paths
from a1q.recipe.text import Node

Reference = str | Mapping[str, Any] | None
"""What an input refers to: a stage's id, `model` for the recipe's own, a `{source: ...}` mapping, or nothing."""


@dataclass(frozen=True)
class StageSpec:
    """One stage of a recipe: its options are validated and default-filled, its inputs point to earlier stages."""

    index: int
    """Position in the recipe's list, from 0."""
    id: str
    type: str
    """The stage key, such as `quantize`."""
    options: Mapping[str, Any]
    """Plain JSON values, without `from`."""
    from_: str | None
    inputs: Mapping[str, Reference]
    """By input name, in the schema's order."""
    output: str
    """Artifact kind."""
    data: tuple[str, ...]
    """Names of the data entries that the options mention."""
    uses: frozenset[tuple[str, str]]
    """(family, name) of the schemes and exporters that the options mention."""

    @property
    def path(self) -> paths.Path:
        """Where the options stand in the recipe."""
        return ("stages", self.index, self.type)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    file: str
    text: str
    """The file's text, verbatim."""
    root: Node
    """The composed recipe with the place of every value."""
    document: Mapping[str, Any]
    """The resolved recipe: composed, overridden, default-filled plain values."""
    name: str
    seed: int
    runtime: Mapping[str, Any]
    model: Mapping[str, Any] | None
    data: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Group]
    stages: tuple[StageSpec, ...]

    def problem(self, path: paths.Path, message: str, hint: str = "") -> Problem:
        """A problem at `path`, or at the nearest place that was written; for a stage's own path, at its stage key."""
        return problem_at(self.root, path, message, hint, at_key=path[:1] == ("stages",) and len(path) == 3)


def problem_at(root: Node, path: paths.Path, message: str, hint: str = "", at_key: bool = False) -> Problem:
    """A `Problem` at the value of `path` in `root`, or at its key; where nothing was written, at the key above."""
    node = paths.find(root, path)
    at_key = at_key or paths.exact(root, path) is None
    place = (node.key_place if at_key else None) or node.place
    return Problem(message, place.file, place.line, place.column, paths.show(paths.stage_ids(root), path), hint)
