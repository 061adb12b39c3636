"""What verification runs over and what a package must reach. Light: read by recipes and `a1q verify --help`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Verify:
    """The option `verify` of the exporter; see schemas/exporters/coreml.json, where the defaults stand too."""

    prompt: int
    generate: int
    random: int
    min_cosine: float
    min_cosine_fp16: float
    max_error: float
    min_agreement: float


def default_verify() -> Verify:
    """What a recipe gets that does not say."""
    schema = Path(__file__).parent.parent / "schemas" / "exporters" / "coreml.json"
    options = json.loads(schema.read_text(encoding="utf-8"))["properties"]["verify"]["properties"]
    return Verify(**{name: option["default"] for name, option in options.items()})
