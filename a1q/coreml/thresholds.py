"""What verification runs over and what a package must reach. Light: read by recipes and `a1q verify --help`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

SECOND_CHUNK = 16
"""Tokens by which the default prompt exceeds a chunk of prefill."""


@dataclass(frozen=True)
class Verify:
    """The option `verify` of the exporter; see schemas/exporters/coreml.json, where the defaults stand too."""

    prompt: int | None
    generate: int
    random: int
    min_cosine: float
    min_cosine_fp16: float
    max_error: float
    min_agreement: float

    def prompt_length(self, prefill: int) -> int:
        """Tokens of the prompt: by default a full chunk of prefill and part of a second one."""
        return prefill + SECOND_CHUNK if self.prompt is None else self.prompt


def default_verify() -> Verify:
    """What a recipe gets that does not say."""
    schema = Path(__file__).parent.parent / "schemas" / "exporters" / "coreml.json"
    options = json.loads(schema.read_text(encoding="utf-8"))["properties"]["verify"]["properties"]
    return Verify(**{name: option["default"] for name, option in options.items()})
