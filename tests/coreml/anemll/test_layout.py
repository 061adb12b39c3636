from __future__ import annotations

import re
import subprocess
import sys

import pytest

from a1q.coreml.anemll.layout import problems
from a1q.coreml.layouts import Options, get_layout
from tests.coreml.anemll.exported import options

CONFIG = {"model_type": "qwen3", "vocab_size": 320, "num_hidden_layers": 2}


def test_nothing_to_say_of_what_fits():
    assert problems(CONFIG, Options(128, 32), 1) == []
    assert problems(CONFIG, options(head_parts=10, chunks=2), 16) == []


@pytest.mark.parametrize(
    ("config", "changes", "step", "message"),
    [
        ({}, {"head_parts": 7}, 1, "head_parts 7 does not divide a head of 320 rows.* these do: 4, 5, 8, 10"),
        ({}, {"head_parts": 8}, 16, "head_parts 8 does not divide a head of 320 rows into equal parts of whole groups"),
        ({}, {"chunks": 3}, 1, "chunks is 3, but there are 2 layers"),
        ({"vocab_size": 151936}, {"head_parts": 8}, 1, "head_parts 8 gives 18992 rows each; .* up to 16384"),
        ({"vocab_size": 2**20 + 7}, {}, 1, "can't be cut into equal parts of at most 16384 rows"),
    ],
)
def test_what_does_not_fit_is_said_with_what_would(config, changes, step, message):
    found = problems({**CONFIG, **config}, options(**changes), step)
    assert len(found) == 1 and re.search(message, found[0])


def test_the_layout_is_found_by_name_and_imports_nothing_heavy():
    assert get_layout("anemll").STATE == "model_model_kv_cache_0"
    program = "import sys, a1q.coreml.anemll.layout; print([m for m in ('torch', 'coremltools') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
