"""Losses from states and head, tile by tile, against the same from all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from a1q.distill import head as module
from a1q.distill import tiles
from a1q.distill.head import Head, head_of
from a1q.distill.losses import Terms, asked_of, kd_loss, loss_of
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.linear import QuantLinear
from a1q.quant.tied import TiedHead, swap_module
from tests.distill.test_losses import make_batch
from tests.tiny import tiny_family, tiny_model

B, L, H, V = 2, 7, 12, 60
TERMS = [
    {},
    {"temperature": 2.0, "hard_top1": 0.3, "hard_full": 0.2},
    {"temperature": 0.7, "tail": "candidates"},
    {"tail": "bucket", "hard_full": 1.0},
    {"kl": 0.0, "hard_top1": 0.5, "hard_full": 1.0},
]
each_term = pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(map(str, terms.values())) or "plain")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles, the last one shorter."""
    monkeypatch.setattr(tiles, "TILE", 1)
    monkeypatch.setattr(tiles, "ROWS", (16, 16))
    monkeypatch.setattr(module, "PAIRS", 5)


def setting(seed: int = 0, dtype: torch.dtype = torch.float64, bias: bool = False):
    """States, a dense head, and a teacher's word."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, L, H, dtype=dtype, generator=random).requires_grad_()
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype, generator=random))
    teacher = 3 * torch.randn(B, L, V, dtype=torch.float64, generator=random)
    return hidden, head, make_batch(teacher, 8, 10, seed)


def by_tiles(hidden, head, batch, **terms):
    wanted = Terms(**terms)
    wanted.check(batch, head.vocabulary)
    return loss_of(*head.partitions_and_picked(hidden, asked_of(batch, wanted), wanted.temperatures), batch, wanted)


@each_term
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(terms, trains, bias):
    hidden, head, batch = setting(bias=bias)
    head.weight.requires_grad_(trains)
    if bias:
        head.bias.requires_grad_(False)
    inputs = [hidden, head.weight] if trains else [hidden]
    expected, figures = kd_loss(head(hidden), batch, **terms)
    found, same = by_tiles(hidden, Head(head), batch, **terms)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert same.keys() == figures.keys()
    gradients = (torch.autograd.grad(3 * loss, inputs) for loss in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 16, 17, 59, 60, 61]), st.integers(1, 5), st.booleans())
def test_any_vocabulary_and_number_of_ids(seed, vocabulary, count, trains):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 5, 3, dtype=torch.float64, generator=random).requires_grad_()
    dense = nn.Linear(3, vocabulary, bias=False, dtype=torch.float64)
    dense.weight.requires_grad_(trains)
    index = torch.randint(vocabulary, (1, 5, count), generator=random)  # ids may be asked for twice
    (partition,), picked = Head(dense).partitions_and_picked(hidden, index, (1.5,))
    logits = dense(hidden)
    expected = [torch.logsumexp(logits / 1.5, -1), logits.gather(-1, index)]
    weights = [torch.randn(part.shape, dtype=torch.float64, generator=random) for part in expected]
    for ours, theirs in zip((partition, picked), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    inputs = [hidden, dense.weight] if trains else [hidden]
    found, wanted = (
        torch.autograd.grad(sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)), inputs)
        for parts in ((partition, picked), expected)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_logits_too_large_to_exponentiate():
    hidden, head, batch = setting()
    with torch.no_grad():
        head.weight.mul_(1e4)
    head.weight.requires_grad_(False)
    found, expected = by_tiles(hidden, Head(head), batch)[0], kd_loss(head(hidden), batch)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (found, expected)]
    assert bool(torch.isfinite(gradients[0]).all())
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


HEADS = (
    {"scheme": "lut_lowrank", "bits": 3},
    {"scheme": "lut_lowrank", "bits": 2, "rank": 2},
    {"scheme": "vector_lut", "bits": 2},
    {"scheme": "lut", "bits": 2, "granularity": "group", "channels": 4},
    {"scheme": "balanced", "bits": 2},
    {"scheme": "affine", "bits": 4, "granularity": "group", "group_size": 4},
)


@pytest.mark.parametrize("spec", HEADS, ids=lambda spec: "-".join(map(str, spec.values())))
@pytest.mark.parametrize("state", ["trains", "latent", "still", "snapped"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_heads(spec, state, tied):
    hidden, dense, batch = setting(dtype=torch.float32)
    quantized: QuantLinear | QuantEmbedding
    if tied:
        table = nn.Embedding(V, H)
        table.weight.data.copy_(dense.weight.data)
        quantized = QuantEmbedding.quantize(table, spec, keep_latent=state in ("latent", "still"))
    else:
        quantized = QuantLinear.quantize(dense, spec, keep_latent=state in ("latent", "still"))
    if state == "snapped":
        quantized.snap()
    quantized.requires_grad_(state in ("trains", "latent"))
    quantized.straight_through_fp16 = state == "latent"
    used = TiedHead(quantized) if tied else quantized
    parts = [part for part in quantized.parameters() if part.requires_grad]
    assert bool(parts) == (state in ("trains", "latent"))
    found, expected = by_tiles(hidden, Head(used), batch)[0], kd_loss(used(hidden), batch)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, [hidden, *parts], allow_unused=True) for loss in (found, expected)), strict=True
    ):
        # where factors are rounded, the weight's own gradients are those at the factors before
        near = {"rtol": 2e-3, "atol": 1e-3} if state == "latent" else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(ours, theirs, **near)


@pytest.mark.parametrize("trains", [False, True])
def test_a_quantized_head_without_a_latent_is_never_made_whole(monkeypatch, trains):
    hidden, dense, batch = setting(dtype=torch.float32)
    head = QuantLinear.quantize(dense, {"scheme": "lut_lowrank", "bits": 3}, keep_latent=False).requires_grad_(trains)
    monkeypatch.setattr(QuantLinear, "weight", property(lambda self: pytest.fail("the whole weight was made")))
    monkeypatch.setattr(QuantLinear, "dequantize", lambda self: pytest.fail("the whole weight was made"))
    by_tiles(hidden, Head(head), batch)[0].backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("trains", [False, True])
def test_autocast_computes_as_the_head_would(trains):
    hidden, dense, batch = setting(dtype=torch.float32)
    dense.weight.requires_grad_(trains)
    inputs = [hidden, dense.weight] if trains else [hidden]
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = kd_loss(dense(hidden), batch)[0], by_tiles(hidden, Head(dense), batch)[0]
    exact = kd_loss(dense(hidden), batch)[0]
    assert abs((found - expected).item()) < 0.02 * exact.item()
    for ours, theirs in zip(*(torch.autograd.grad(loss, inputs) for loss in (found, exact)), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm().item() < 0.03 * theirs.norm().item()


def test_which_models_have_such_a_head():
    for family in ("qwen3", "qwen2", "llama", "mistral", "gemma3_text"):
        assert head_of(tiny_family(family)) is not None
    model = tiny_model(tie_word_embeddings=False)
    assert head_of(model) is not None
    swap_module(model, "lm_head", QuantLinear.quantize(model.lm_head, {"scheme": "lut", "bits": 4}))
    assert head_of(model) is not None
    model.lm_head.set_adapter(torch.zeros(2, model.config.hidden_size), torch.zeros(model.config.vocab_size, 2), 1.0)
    assert head_of(model) is None, "an adapter is no part of the weight"
    capped = tiny_family("gemma3_text", final_logit_softcapping=2.0)
    assert head_of(capped) is None
