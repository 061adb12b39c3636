"""A package that is whole, and called otherwise than meta.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from a1q.coreml.interface import interface_problems
from a1q.coreml.weightfile import read_spec
from tests.coreml.bundles import bundle_of
from tests.coreml.models import SCHEMES, decoder


@pytest.fixture(scope="module", params=["single", "anemll"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(decoder(SCHEMES["channel-3"]), tmp_path_factory.mktemp("whole"), request.param).folder


def problems(folder: Path, changes: dict[str, Any], functions: dict[str, int] | None = None) -> str:
    """What is found over all parts when meta.json says something else."""
    meta = json.loads((folder / "meta.json").read_text()) | changes
    found = []
    for part in meta["parts"]:
        if functions and part["role"] in ("model", "ffn"):
            part["functions"] = functions
        found += interface_problems(read_spec(folder / part["file"]), part, meta)
    return "\n".join(found)


def test_nothing_of_a_whole_one(folder):
    assert problems(folder, {}) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 256}, "128, 32], meta.json says 256 positions"),
        ({"state": "cache"}, "has no state cache, which meta.json names"),
        ({"vocabulary": 321}, "gives 320 logits, meta.json says 321"),
        ({"outputs": ["scores"]}, "has no output scores, which meta.json names"),
    ],
)
def test_another_cache_or_other_logits(folder, changes, words):
    assert words in problems(folder, changes)


def test_other_positions(folder):
    assert "takes 32 positions in prefill, meta.json says 64" in problems(folder, {}, {"infer": 1, "prefill": 64})


def test_other_functions(folder):
    assert "has no function infer_base" in problems(folder, {}, {"infer_base": 1})
