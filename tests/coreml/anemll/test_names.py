from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.coreml.anemll.names import PREFIXES, default_splits, file_name, logits_names
from a1q.coreml.architecture import FAMILIES


def test_files():
    assert file_name("qwen", "embeddings", None) == "qwen_embeddings.mlpackage"
    assert file_name("qwen", "lm_head", 4) == "qwen_lm_head_lut4.mlpackage"
    assert file_name("qwen", "FFN_PF", 2, (1, 1)) == "qwen_FFN_PF_lut2_chunk_01of01.mlpackage"
    assert file_name("llama", "FFN_PF", None, (3, 12)) == "llama_FFN_PF_chunk_03of12.mlpackage"


def test_every_family_has_a_prefix_that_the_apps_read_whole():
    assert set(PREFIXES) == set(FAMILIES)
    assert len(set(PREFIXES.values())) == len(PREFIXES)
    assert all(re.fullmatch("[a-zA-Z0-9_]+", prefix) for prefix in PREFIXES.values())


@pytest.mark.parametrize(
    ("model_type", "vocabulary", "splits"),
    [("qwen3", 151936, 16), ("qwen2", 151936, 16), ("llama", 128256, 8), ("mistral", 32768, 8), ("mistral", 131072, 8),
     ("gemma3_text", 262144, 16), ("gemma3_text", 262208, 17), ("qwen3", 323, 17), ("llama", 7, 7), ("llama", 9, 9),
     ("llama", 3, 3), ("llama", 2**20 + 7, 0)],
)  # fmt: skip
def test_the_usual_splits_or_the_next_that_divide(model_type, vocabulary, splits):
    assert default_splits(model_type, vocabulary) == splits


@given(st.integers(1, 300_000), st.sampled_from([1, 8, 16, 64]))
def test_splits_are_even_keep_tables_whole_and_fit_the_hardware(vocabulary, step):
    splits = default_splits("qwen3", vocabulary, step)
    if splits:
        assert vocabulary % (splits * step) == 0 and vocabulary // splits <= 16384
    else:
        assert not any(vocabulary % (n * step) == 0 and vocabulary // n <= 16384 for n in range(1, 65))


def test_logits_are_counted_from_one_even_when_there_is_one():
    assert logits_names(1) == ["logits1"]
    assert logits_names(3) == ["logits1", "logits2", "logits3"]
