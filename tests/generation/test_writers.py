"""Writers against whole forward passes: of models of every family, and of packages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a1q.coreml.runner import InterpreterBackend, make_runner
from a1q.errors import StageError
from a1q.generation.sampling import Sampler, Sampling
from a1q.generation.writers import ModelWriter, PackageWriter, Writer, write
from tests.coreml.bundles import bundle_of
from tests.coreml.models import SCHEMES, decoder
from tests.tiny import FAMILIES, tiny_family, tiny_model

GREEDY = Sampler(Sampling(temperature=0.0), 0)
PROMPT = [5, 9, 200, 31]


class Fixed(Writer):
    """Always the same logits."""

    context, vocabulary, device = 100, 3, "nowhere"

    def __init__(self, logits):
        super().__init__()
        self.logits = np.array(logits, np.float32)

    def _extend(self, tokens):
        return self.logits

    def _keep(self, count):
        return 0


def test_the_end_of_the_text_is_given_and_ends_it():
    writer = Fixed([0, 1, 0])
    logits, _ = writer.begin([0])
    assert list(write(writer, logits, 9, [1], GREEDY)) == [1]
    assert list(write(writer, logits, 3, [2], GREEDY)) == [1, 1, 1]
    assert writer.tokens == [0, 1, 1], "the last token is not fed"


def test_logits_that_are_not_finite_are_said():
    with pytest.raises(StageError, match="the logits behind token 2 are not finite"):
        Fixed([0, np.nan]).begin([1, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_writes_what_transformers_lets_it_write(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a1q.generation.writers.PIECE", 3)
    model = tiny_family(family)
    writer = ModelWriter(model)
    logits, computed = writer.begin(PROMPT)
    found = list(write(writer, logits, 30, [], GREEDY))
    with torch.inference_mode():
        wanted = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 4:].tolist()
    assert found == wanted and computed == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_new_text_has_in_common_is_not_computed_again(family: str) -> None:
    model = tiny_family(family)
    writer = ModelWriter(model)
    draw = np.random.default_rng(0)
    text = draw.integers(320, size=30).tolist()
    writer.begin(text)
    for kept, fresh in ((30, 5), (10, 20), (0, 8), (3, 1)):
        text = text[:kept] + draw.integers(320, size=fresh).tolist()
        logits, computed = writer.begin(text)
        assert computed == (fresh if family != "gemma3_text" or kept == 30 else len(text))
        with torch.inference_mode():
            whole = model(torch.tensor([text])).logits[0, -1].numpy()
        np.testing.assert_allclose(logits, whole, atol=2e-4)
        assert writer.tokens == text
    logits, computed = writer.begin(text)  # the same again: its last token's logits are wanted
    np.testing.assert_allclose(logits, whole, atol=2e-4)
    assert computed == (1 if family != "gemma3_text" else len(text))


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [[7], [7, 8, 9, 10, 11]])
def test_after_an_interruption_what_all_layers_know_is_known(family: str, tokens: list[int], monkeypatch) -> None:
    monkeypatch.setattr("a1q.generation.writers.PIECE", 3)
    model = tiny_family(family)
    writer = ModelWriter(model)
    writer.begin(PROMPT)
    for place in (model.model.layers[1].self_attn, model.model.layers[1].mlp, model.lm_head):
        hook = place.register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.extend(tokens)
        hook.remove()
        logits, computed = writer.begin([*PROMPT, *tokens])
        assert computed == len(tokens) + (len(PROMPT) if family == "gemma3_text" else 0)
        with torch.inference_mode():
            whole = model(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1].numpy()
        np.testing.assert_allclose(logits, whole, atol=1e-4)
        writer.begin(PROMPT)


def test_an_interruption_within_a_layer_or_before_anything_is_known() -> None:
    model = tiny_model()
    writer = ModelWriter(model)
    hook = model.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.begin(PROMPT)
    hook.remove()
    assert writer.begin(PROMPT)[1] == 4
    layer = writer._cache.layers[1]
    layer.keys = torch.cat([layer.keys, layer.keys[:, :, -1:]], dim=-2)  # its values were to follow
    hook = model.model.layers[0].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.extend([7])
    hook.remove()
    logits, computed = writer.begin([*PROMPT, 7])
    assert computed == 5
    with torch.inference_mode():
        np.testing.assert_allclose(logits, model(torch.tensor([[*PROMPT, 7]])).logits[0, -1].numpy(), atol=1e-4)


def test_more_than_the_context_is_a_defect() -> None:
    with pytest.raises(ValueError, match="don't fit a context of 100"):
        Fixed([0, 1]).extend([1] * 101)


@pytest.mark.parametrize("layout", ["single", "anemll"])
def test_a_package_writes_what_its_model_writes(tmp_path, layout):
    model = decoder(SCHEMES["rank-1"])
    bundle = bundle_of(model, tmp_path, layout)
    writer = PackageWriter(make_runner(bundle, InterpreterBackend(bundle, "fp32")), "interpreter")
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(40):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    for _ in range(2):  # and again, in place of the text before
        logits, _ = writer.begin(PROMPT)
        assert list(write(writer, logits, 40, [], GREEDY)) == tokens[4:]
    logits, computed = writer.begin(tokens)
    assert computed == 1 and int(logits.argmax()) == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
