"""A plan: a recipe whose every reference is resolved, ready for the interpreter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from a1q.engine.artifact import Artifact
from a1q.engine.stage import DataEntry, Group, Outcome, Runtime, Stage

SOURCE = "model"
"""The id by which an input refers to the recipe's own `model:`."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage, checked against its inputs."""

    id: str
    type: str
    """The stage key, such as `quantize`."""
    stage: Stage
    config: Any
    """The typed config handed to the stage."""
    options: Mapping[str, Any]
    """The same as plain JSON values: validated, default-filled, and what enters the cache key; a `{source: ...}` of its
    own is an empty mapping here, for its content is an input."""
    inputs: Mapping[str, str | Artifact | None]
    """Input name -> id of the producing stage, `SOURCE` for the recipe's model, None for an absent one, or an
    Artifact where the option holds a `{source: ...}` mapping of its own (a larger teacher)."""
    output: str
    """Artifact kind."""
    outcome: Outcome
    data: Mapping[str, DataEntry] = field(default_factory=dict)
    """The data entries this stage reads, by entry name."""
    groups: Mapping[str, Group] = field(default_factory=dict)
    """The groups this stage uses."""
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the modules that each of these groups matches."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Digest of every plug-in file this stage comes from or uses."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Versions of the schemes and exporters this stage uses: they enter the cache key too."""


@dataclass(frozen=True)
class Plan:
    """A whole recipe, checked."""

    name: str
    seed: int
    runtime: Runtime
    source: Artifact | None
    """The recipe's model; None for a recipe that starts with `pretrain`."""
    stages: tuple[PlannedStage, ...]
    recipe_file: str
    recipe_text: str
    resolved: Mapping[str, Any]
    """The resolved recipe document: composed, overridden, default-filled."""
    smoke: bool = False


def stage_seed(seed: int, stage_id: str) -> int:
    """Seed of a stage: from the run's seed and the stage's id, so that inserting a stage shifts no other.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.sha256(f"{seed}/{stage_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
