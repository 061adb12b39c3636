"""The loss beside a teacher that runs along, against float64 formulas over whole distributions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from a1q.distill import tiles
from a1q.distill.exact import exact_loss, exact_loss_of
from a1q.distill.head import Head
from a1q.distill.losses import Terms, following, kd_loss
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.linear import QuantLinear
from a1q.quant.tied import TiedHead
from tests.distill.test_losses import make_batch, pair
from tests.watch import Largest

B, L, H, V, WIDTH = 2, 7, 12, 60, 9
TERMS = [
    {},
    {"temperature": 2.0},
    {"temperature": 0.7, "hard_top1": 0.3, "hard_full": 0.2},
    {"hard_top1": 1.5},
    {"hard_full": 1.0},
]
each_term = pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(map(str, terms.values())) or "plain")


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, the last one shorter."""
    monkeypatch.setattr(tiles, "TILE", 1)
    monkeypatch.setattr(tiles, "ROWS", (16, 16))


def formula(student, teacher, tokens, temperature=1.0, hard_top1=0.0, hard_full=0.0):
    """The definition, from logits, by torch's own functions."""
    p, q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    loss = temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    cross_entropy = nn.functional.cross_entropy
    loss = loss + hard_top1 * cross_entropy(student.flatten(0, 1), teacher.argmax(-1).flatten())
    return loss + hard_full * cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def by_tiles(hidden, head, teacher, taught, batch, **terms):
    wanted = Terms(**terms)
    found = Head(head).beside(hidden, following(batch.tokens), wanted.temperatures, Head(teacher), taught)
    return exact_loss_of(*found, wanted, batch)


def setting(seed=0, dtype=torch.float64, bias=False):
    """A student's states and dense head, and a teacher's of another width, near enough to matter."""
    random = torch.Generator().manual_seed(seed)
    heads = [nn.Linear(width, V, bias=bias, dtype=dtype).requires_grad_(False) for width in (H, WIDTH)]
    states = [torch.randn(B, L, width, dtype=dtype, generator=random) for width in (H, WIDTH)]
    for head in heads:
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype, generator=random))
    tokens = torch.randint(V, (B, L), generator=random)
    batch = make_batch(torch.zeros(B, L, V, dtype=torch.float64), 1, 0, tokens=tokens)
    return states[0].requires_grad_(), heads[0], heads[1], states[1], batch


def same_gradients(losses, inputs, rtol=1e-9, atol=1e-12):
    for ours, theirs in zip(*(torch.autograd.grad(3 * loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@each_term
def test_from_logits_it_is_the_formula(terms):
    teacher, student = pair()
    batch = make_batch(teacher, 3, 0)
    found, figures = exact_loss(student, teacher, batch, **terms)
    expected = formula(student, teacher, batch.tokens, **terms)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    same_gradients((found, expected), [student])
    assert set(figures) == {"kl", *(name for name in terms if name.startswith("hard"))}
    weights = {"kl": 1.0, **terms}
    assert sum(weights[name] * term.item() for name, term in figures.items()) == pytest.approx(found.item())


@each_term
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tile_by_tile_it_is_the_formula(terms, trains, bias, small_tiles):
    hidden, head, teacher, taught, batch = setting(bias=bias)
    head.weight.requires_grad_(trains)
    inputs = [hidden, head.weight] if trains else [hidden]
    found, figures = by_tiles(hidden, head, teacher, taught, batch, **terms)
    expected = formula(head(hidden), teacher(taught), batch.tokens, **terms)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    same_gradients((found, expected), inputs)
    assert figures.keys() == exact_loss(head(hidden), teacher(taught), batch, **terms)[1].keys()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 255, 256, 257, 700]), st.sampled_from([1.0, 3.0]))
def test_any_vocabulary(seed, vocabulary, temperature):
    random = torch.Generator().manual_seed(seed)
    hidden, taught = (torch.randn(1, 3, 4, dtype=torch.float64, generator=random) for _ in range(2))
    head, teacher = (nn.Linear(4, vocabulary, bias=False, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_()
    batch = make_batch(torch.zeros(1, 3, vocabulary, dtype=torch.float64), 1, 0)
    expected = formula(head(hidden), teacher(taught), batch.tokens, temperature, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 1)
        found, _ = by_tiles(hidden, head, teacher, taught, batch, temperature=temperature, hard_top1=0.5)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        same_gradients((found, expected), [hidden, head.weight], rtol=1e-8)


@pytest.mark.parametrize("state", ["trains", "latent", "still", "snapped"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_quantized_heads(state, tied, temperature, small_tiles):
    hidden, dense, teacher, taught, batch = setting(dtype=torch.float32)
    spec = {"scheme": "lut_lowrank", "bits": 3}
    if tied:
        table = nn.Embedding(V, H)
        table.weight.data.copy_(dense.weight.data)
        quantized = QuantEmbedding.quantize(table, spec, keep_latent=state in ("latent", "still"))
    else:
        quantized = QuantLinear.quantize(dense, spec, keep_latent=state in ("latent", "still"))
    if state == "snapped":
        quantized.snap()
    quantized.requires_grad_(state in ("trains", "latent"))
    head = TiedHead(quantized) if tied else quantized
    found, _ = by_tiles(hidden, head, teacher, taught, batch, temperature=temperature)
    # in float64 from the weight on
    weight, states = quantized.weight.double(), hidden.double()
    expected = formula(states @ weight.T, teacher(taught).double(), batch.tokens, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = [hidden, *(part for part in quantized.parameters() if part.requires_grad)]
    pairs = zip(*(torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@each_term
def test_a_cache_of_the_whole_vocabulary_says_the_same(terms):
    teacher, student = pair()
    batch = make_batch(teacher, V, 0, starts=torch.arange(B * L).reshape(B, L) % 3 == 1)
    found, expected = exact_loss(student, teacher, batch, **terms)[0], kd_loss(student, batch, **terms)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    same_gradients((found, expected), [student])


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_perfect_student_has_no_loss_and_no_gradient(tiled, temperature, small_tiles):
    """In float32: noise of the loss stays at the rounding error of a logit, and the gradient vanishes."""
    hidden, head, *_, batch = setting(dtype=torch.float32)
    if tiled:
        loss, _ = by_tiles(hidden, head, head, hidden.detach(), batch, temperature=temperature)
    else:
        loss, _ = exact_loss(head(hidden), head(hidden), batch, temperature=temperature)
    assert abs(loss.item()) < 1e-5
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-6


@pytest.mark.parametrize("trains", [False, True])
def test_autocast_computes_as_the_heads_would(trains, small_tiles):
    hidden, head, teacher, taught, batch = setting(dtype=torch.float32)
    head.weight.requires_grad_(trains)
    inputs = [hidden, head.weight] if trains else [hidden]
    exact = formula(head(hidden), teacher(taught), batch.tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = by_tiles(hidden, head, teacher, taught, batch)
        plain, _ = exact_loss(head(hidden), teacher(taught), batch)
    assert abs((found - plain).item()) < 1e-4 * exact.item()  # the same rounded logits
    assert abs((found - exact).item()) < 0.02 * exact.item()
    for ours, theirs in zip(*(torch.autograd.grad(loss, inputs) for loss in (found, exact)), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm().item() < 0.03 * theirs.norm().item()


def test_logits_too_large_to_exponentiate(small_tiles):
    hidden, head, teacher, taught, batch = setting()
    for module in (head, teacher):
        module.weight.mul_(1e4)
    found, _ = by_tiles(hidden, head, teacher, taught, batch)
    expected = formula(head(hidden), teacher(taught), batch.tokens)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    same_gradients((found, expected), [hidden])


@pytest.mark.parametrize("trains", [False, True])
def test_no_tensor_of_all_logits_is_made(trains):
    count, vocabulary = 96, 4096
    hidden, taught = torch.randn(1, count, H).requires_grad_(), torch.randn(1, count, WIDTH)
    head, teacher = (nn.Linear(width, vocabulary, bias=False) for width in (H, WIDTH))
    head.weight.requires_grad_(trains)
    batch = make_batch(torch.zeros(1, count, 2, dtype=torch.float64), 1, 0)
    with pytest.MonkeyPatch.context() as patch, Largest() as seen:
        patch.setattr(tiles, "TILE", 1)
        by_tiles(hidden, head, teacher, taught, batch, temperature=2.0, hard_top1=0.1, hard_full=0.1)[0].backward()
    assert hidden.grad is not None and (head.weight.grad is not None) == trains
    assert seen.numbers <= max(count * 256, vocabulary * H) < count * vocabulary / 4
    with Largest() as seen:
        exact_loss(head(hidden), teacher(taught), batch)
    assert seen.numbers == count * vocabulary  # the watch would see it


def test_another_vocabulary_is_refused():
    teacher, student = pair()
    with pytest.raises(ValueError, match="vocabulary is 59, the teacher's 60"):
        exact_loss(student[..., :-1], teacher, make_batch(teacher, 3, 0))
