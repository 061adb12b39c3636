"""Rules by module: what a stage that chooses schemes hands to the stage that fits them. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1q.engine.artifact import Artifact
from a1q.errors import StageError

FILE = "rules.json"


@dataclass(frozen=True)
class Rule:
    """What one module gets."""

    group: str
    """The group of the recipe that the module was found by."""
    schemes: tuple[Mapping[str, Any], ...]
    """Scheme mappings: one where it is decided; while planning, all that may be chosen, the largest first."""


def read_rules(artifact: Artifact) -> dict[str, Rule]:
    """Module -> its rule, from an artifact of kind `rules`.

    Raises:
        StageError: if the file is damaged.
    """
    path = artifact.path / FILE
    try:
        modules = json.loads(path.read_bytes())["modules"]
        return {name: Rule(str(item["group"]), (dict(item["scheme"]),)) for name, item in modules.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StageError(f"{path} can't be read: {error}") from None
