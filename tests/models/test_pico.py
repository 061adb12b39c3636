"""The shipped model, loaded by plain transformers."""

from pathlib import Path

import numpy
import pytest

from a1q.data import token_sequences
from a1q.models.source import resolve_source
from a1q.stages.pretrain import mean_loss, unigram_entropy


@pytest.fixture(scope="module")
def pico() -> Path:
    return Path(__file__).parents[2] / "a1q" / "models" / "pico"


@pytest.fixture(scope="module")
def model(pico: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()


def test_size_and_shape(pico: Path, model):
    assert sum(path.stat().st_size for path in pico.iterdir()) <= 8_000_000
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_672_832
    assert model.config.model_type == "qwen3" and model.config.vocab_size == 2048
    assert {path.suffix for path in pico.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_it_knows_the_language_of_the_test_side(pico: Path, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """About five seconds: extracts the real built-in text."""
    monkeypatch.setenv("A1Q_HOME", str(tmp_path))
    entry = {"source": "builtin:prose", "holdout": 0.05}
    train = token_sequences(entry, pico, "train", 128, None, 0)
    test = token_sequences(entry, pico, "test", 128, 48, 0)
    known = unigram_entropy(train, test, 2048)
    assert 5.5 < known < numpy.log(2048)
    assert mean_loss(model, test) < known - 2.5


def test_it_speaks(pico: Path, model):
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pico)
    prompt = tokenizer("Return the number of", return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    words = tokenizer.decode(out[0], skip_special_tokens=True).split()
    assert len(words) > 8 and len(set(words)) > 6
    assert all(letter.isprintable() for word in words for letter in word)


def test_it_resolves_as_the_built_in_source(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path))
    assert resolve_source("builtin:pico").path == pico
