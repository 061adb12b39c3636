"""A head tied to a quantized embedding: one weight, one set of parameters, the gradients of both uses."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch.func import functional_call

from a1q.quant.embedding import QuantEmbedding
from a1q.quant.linear import QuantLinear
from a1q.quant.module import quantized_modules
from a1q.quant.tied import TiedHead, swap_module
from tests.tiny import tiny_model

EMBEDDING = "model.embed_tokens"
TOKENS = torch.randint(320, (2, 11), generator=torch.Generator().manual_seed(5))
SPECS = [
    {"scheme": "lut", "bits": 4},
    {"scheme": "lut", "bits": 3, "granularity": "group", "channels": 16},
    {"scheme": "lut", "bits": 4, "granularity": "channel"},
    {"scheme": "lut_lowrank", "bits": 4},
    {"scheme": "lut_lowrank", "bits": 2, "rank": 2},
    {"scheme": "balanced", "bits": 4},
    {"scheme": "affine", "bits": 4, "granularity": "channel"},
]
over_schemes = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))


def quantized(spec: dict[str, Any], tied: bool = True, keep: bool = True) -> Any:
    model = tiny_model(tie_word_embeddings=tied)
    table = QuantEmbedding.quantize(model.model.embed_tokens, spec, keep_latent=keep)
    swap_module(model, EMBEDDING, table)
    if not tied:
        swap_module(model, "lm_head", QuantLinear.quantize(model.lm_head, spec, keep_latent=keep))
    return model


@over_schemes
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("snapped", [True, False])
def test_logits_are_those_of_a_plain_model_with_the_dequantized_weights(spec, tied: bool, snapped: bool) -> None:
    model = quantized(spec, tied)
    plain = tiny_model(tie_word_embeddings=tied)
    with torch.no_grad():
        for name, module in quantized_modules(model):
            if snapped:
                module.snap()
            plain.get_submodule(name).weight.copy_(module.dequantize())
        torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in quantized_modules(model)]
    assert names == ([EMBEDDING] if tied else [EMBEDDING, "lm_head"])
    assert isinstance(model.lm_head, TiedHead if tied else QuantLinear)


@pytest.mark.parametrize("tied", [True, False])
def test_a_latent_gets_the_gradient_of_the_dense_weight(tied: bool) -> None:
    """Straight-through: dL/dV is the dense weight's gradient where the weight is Ŵ, both uses of a tied one added."""
    model, plain = quantized(SPECS[3], tied), tiny_model(tie_word_embeddings=tied)
    with torch.no_grad():
        for name, module in quantized_modules(model):
            plain.get_submodule(name).weight.copy_(module.dequantize())
    for each in (model, plain):
        each(TOKENS, labels=TOKENS).loss.backward()
    for name, module in quantized_modules(model):
        expected = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(module.latent.grad, expected, rtol=1e-4, atol=1e-6)
        assert bool(expected.abs().sum() > 0)


def test_parts_get_the_gradient_that_autograd_finds_through_both_uses() -> None:
    model, plain = quantized(SPECS[4]), tiny_model()
    module = model.model.embed_tokens
    model(TOKENS, labels=TOKENS).loss.backward()
    names = ("lut", "a", "g", "b")
    lut, a, g, b = leaves = [getattr(module, name).detach().clone().requires_grad_() for name in names]
    weight = lut[module.parts()["indices"].long()] * (a @ torch.diag(g) @ b)
    tied = {f"{EMBEDDING}.weight": weight}
    functional_call(plain, tied, (TOKENS,), {"labels": TOKENS}).loss.backward()
    for name, leaf in zip(names, leaves, strict=True):
        torch.testing.assert_close(getattr(module, name).grad, leaf.grad, rtol=1e-3, atol=1e-6)


def test_parameters_are_listed_and_stored_once_and_transformers_ties_nothing_dense() -> None:
    model = quantized(SPECS[3])
    names = [name for name, _ in model.named_parameters() if "embed" in name or "lm_head" in name]
    assert names == [f"{EMBEDDING}.{part}" for part in ("lut", "a", "g", "b", "gain", "latent")]
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    model.tie_weights()
    assert isinstance(model.lm_head, TiedHead)
    assert model.lm_head.source is model.get_input_embeddings() is model.model.embed_tokens
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert tiny_model().all_tied_weights_keys  # of this model only, not of its class


def test_a_copy_and_a_second_exchange_keep_the_tie() -> None:
    model = quantized(SPECS[0])
    twin = copy.deepcopy(model)
    assert twin.lm_head.source is twin.model.embed_tokens is not model.model.embed_tokens
    other = QuantEmbedding.quantize(tiny_model(1).model.embed_tokens, SPECS[3])
    swap_module(twin, EMBEDDING, other)
    assert twin.lm_head.source is other
    with torch.no_grad():
        assert not torch.equal(twin(TOKENS).logits, model(TOKENS).logits)


def test_a_bias_of_the_head_stays() -> None:
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(320))
    swap_module(model, EMBEDDING, QuantEmbedding.quantize(model.model.embed_tokens, SPECS[0]))
    x = torch.randn(1, 2, 64)
    torch.testing.assert_close(model.lm_head(x), x @ model.lm_head.weight.T + model.lm_head.bias)
    assert "lm_head.bias" in model.state_dict()


@pytest.mark.parametrize("train", [True, False])
def test_no_dense_table_outlives_a_pass(train: bool) -> None:
    model = quantized(SPECS[3], keep=False)

    def tables() -> int:
        gc.collect()
        found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.shape == (320, 64)]
        return len({item.data_ptr() for item in found if item.is_floating_point()})

    before = tables()
    for _ in range(2):
        with torch.set_grad_enabled(train):
            loss = model(TOKENS, labels=TOKENS).loss
            if train:
                loss.backward()
        del loss
        assert tables() == before


@pytest.mark.parametrize("form", ["factored", "batched"])
def test_every_form_serves_the_head(form: str) -> None:
    model = quantized(SPECS[4])
    with torch.no_grad():
        expected = model(TOKENS).logits
        model.model.embed_tokens.form = form
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
