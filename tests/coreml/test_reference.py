from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from a1q.coreml.reference import Tokens, folder_references, prompt_tokens, random_tokens, references, sequences
from a1q.errors import MismatchError
from tests.coreml.bundles import model_folder
from tests.coreml.models import SCHEMES, decoder
from tests.tiny import tiny_family, tiny_model, write_tokenizer

WANTED = [Tokens((5, 6, 7), generate=4), Tokens((1, 2), forced=(9, 10))]


def test_tokens_logits_and_the_models_own_continuation():
    import torch

    model = decoder()
    text, forced = references(model, WANTED)
    assert (text.prompt, text.written, len(text.tokens)) == (3, 4, 7)
    assert forced.tokens.tolist() == [1, 2, 9, 10] and forced.written == 0
    with torch.inference_mode():
        logits = model(torch.from_numpy(text.tokens[None].astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(text.logits, logits, atol=1e-5)
    assert logits[2:6].argmax(-1).tolist() == text.tokens[3:].tolist()
    assert text.rounded is text.logits, "all weights of this model are fp16 numbers"


def test_rounding_is_apart():
    [found] = references(tiny_model(), WANTED[:1])
    difference = np.abs(found.rounded - found.logits).max()
    assert 1e-5 < difference < 1e-2 * found.logits.std()


def test_the_gains_of_gemma_are_rounded_with_their_offset():
    import torch

    model = tiny_family("gemma3_text")
    norm = model.model.norm.weight
    before = norm.detach().clone()
    references(model, WANTED[:1])
    assert torch.equal(norm + 1, (before + 1).half().float())


def test_parts_of_schemes_are_not_rounded_again():
    """A rank-1 weight is a product of fp16 numbers and not one itself."""
    model = decoder(SCHEMES["rank-1"])
    [found] = references(model, WANTED[:1])
    assert found.rounded is found.logits


def test_a_folder_is_read_as_saved(tmp_path):
    model = decoder(SCHEMES["rank-1"], adapter=2)
    folder = model_folder(model, tmp_path)
    [found] = folder_references(folder, WANTED[:1])
    [plain] = folder_references(folder, WANTED[:1], adapters=False)
    np.testing.assert_allclose(found.logits, references(model, WANTED[:1])[0].logits, atol=1e-4)
    np.testing.assert_allclose(
        plain.logits[:3], references(decoder(SCHEMES["rank-1"]), WANTED[:1])[0].logits[:3], atol=1e-4
    )
    assert np.abs(found.logits[:3] - plain.logits[:3]).max() > 0.1


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(MismatchError, match="is not a model"):
        folder_references(tmp_path, WANTED)


def test_prompt_is_text_where_there_is_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path)
    tokens = prompt_tokens(tmp_path, 320, 300)
    assert len(tokens) == 300
    assert "reads a text file" in Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(tokens)
    assert prompt_tokens(tmp_path, 10, 20) == random_tokens(10, 20), "ids beyond the vocabulary are not used"


def test_a_prompt_begins_as_its_tokenizer_begins_a_text(tmp_path):
    from tokenizers import Tokenizer, processors

    write_tokenizer(tmp_path)
    plain = prompt_tokens(tmp_path, 320, 100)
    file = str(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(file)
    assert prompt_tokens(tmp_path, 320, 100) == [0, *plain[:-1]]


def test_sequences():
    text, random = sequences(Path("nowhere"), 320, 10, 3, 16)
    assert (len(text.prompt), text.generate, text.forced) == (10, 3, ())
    assert (len(random.prompt), len(random.forced), random.generate) == (10, 6, 0)
    assert sequences(Path("nowhere"), 320, 0, 3, 0) == []
