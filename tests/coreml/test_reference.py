from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from a1q.coreml.reference import Tokens, load_for_package, prompt_tokens, random_tokens, references, sequences
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
    [found] = references(load_for_package(folder), WANTED[:1])
    [plain] = references(load_for_package(folder, adapters=False), WANTED[:1])
    np.testing.assert_allclose(found.logits, references(model, WANTED[:1])[0].logits, atol=1e-4)
    np.testing.assert_allclose(
        plain.logits[:3], references(decoder(SCHEMES["rank-1"]), WANTED[:1])[0].logits[:3], atol=1e-4
    )
    assert np.abs(found.logits[:3] - plain.logits[:3]).max() > 0.1


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(MismatchError, match="is not a model"):
        load_for_package(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("adapter", [False, True])
def test_weights_that_core_ml_makes_of_integers_are_fp16_numbers(tmp_path, model_type, adapter):
    """`rounded` is what a model of dense fp16 weights says, the decoded ones."""
    import torch

    from a1q.coreml.repalettize import replace_modules
    from a1q.models.checkpoint import load_model
    from a1q.models.view import read_view
    from a1q.quant.linear import quantized_modules

    folder = model_folder(tiny_family(model_type), tmp_path)
    rules = {"all": {"match": ".*(_proj|embed_tokens)", "scheme": "affine", "bits": 4, "symmetric": False}}
    model, plain = load_model(folder), load_model(folder)
    replace_modules(model, rules, read_view(folder))
    with torch.no_grad():
        for name, module in quantized_modules(model):
            weight = module.dequantize().half().float()
            if adapter and module.kind == "linear":
                module.set_adapter(torch.randn(2, module.shape[1]), torch.randn(module.shape[0], 2), 0.1)
                weight += module.adapter_delta()
            plain.get_submodule(name).weight.copy_(weight)
        for parameter in plain.parameters():
            if parameter.ndim == 1:
                offset = float(model_type == "gemma3_text")
                parameter.copy_((parameter + offset).half().float() - offset)
        tokens = torch.tensor([[1, 2, 9, 10]])
        expected = plain(tokens).logits[0].numpy()
    [found] = references(model, WANTED[1:])
    np.testing.assert_allclose(found.rounded, expected, atol=2e-5)
    assert np.abs(found.logits - expected).max() > 1e-4


def test_rules_that_name_nothing_of_this_model(tmp_path):
    folder = model_folder(decoder(), tmp_path)
    with pytest.raises(MismatchError, match=r"not what the package was made of: repalettize\.a matches no module"):
        load_for_package(folder, repalettized={"a": {"match": "x", "scheme": "lut", "bits": 4}})


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


def test_a_text_reaches_beyond_a_window_that_ends_inside_the_context(tmp_path):
    from dataclasses import replace

    from a1q.coreml.architecture import read_architecture
    from a1q.coreml.reference import STEPPED, STEPS_BEYOND, beyond_window

    sliding = read_architecture(tiny_family("gemma3_text").config.to_dict())
    assert sliding.window == 16
    assert beyond_window(sliding, 32, 128) == 16 + 32 + STEPS_BEYOND
    assert beyond_window(sliding, 128, 128) == 128, "no further than the context"
    assert beyond_window(sliding, 8, 16) == 0, "the window is the context"
    assert beyond_window(replace(sliding, window=0), 32, 128) == 0
    *_, last = sequences(tmp_path, 320, 0, 0, 8, STEPPED + 1)
    assert len(last.forced) == STEPS_BEYOND
    [found] = references(tiny_family("gemma3_text"), [last])
    assert not found.stepped
