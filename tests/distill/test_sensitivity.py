"""KL of a model with some weights changed, against whole forward passes in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a1q.distill.sensitivity import Divergences, divergence, quantized_weight, replaced
from a1q.errors import StageError
from a1q.models.blocks import BlockStream
from a1q.quant.linear import QuantLinear
from tests.tiny import FAMILIES, tiny_family, tiny_model

TOKENS = np.random.default_rng(0).integers(320, size=(5, 24)).astype(np.int32)


def exact(before: torch.Tensor, after: torch.Tensor) -> float:
    """Σ p (log p - log q) in float64."""
    log_p, log_q = (torch.log_softmax(logits.double(), -1) for logits in (before, after))
    return float((log_p.exp() * (log_p - log_q)).sum())


def whole(model, weights: dict[str, torch.Tensor]) -> float:
    """The same figure by two whole passes over all sequences."""
    ids = torch.from_numpy(TOKENS).long()
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with replaced(model, weights):
            after = model(input_ids=ids, use_cache=False).logits
    return exact(before, after) / TOKENS.size


@pytest.mark.parametrize("scale", [3.0, 1e-1, 1e-2, 1e-3])
def test_divergence_is_that_of_float64_however_small(scale: float) -> None:
    torch.manual_seed(0)
    before = 4 * torch.randn(2, 5, 3000)
    after = before + scale * torch.randn_like(before)
    assert divergence(before, after) == pytest.approx(exact(before, after), rel=1e-3)


def test_divergence_of_what_hardly_overlaps_is_finite_and_of_equals_is_zero() -> None:
    before = torch.tensor([[[300.0, 0.0, -300.0]]])
    after = before.flip(-1)
    assert divergence(before, after) == pytest.approx(exact(before, after), rel=1e-6)
    assert divergence(before, before) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_anywhere_are_what_whole_passes_say(family: str) -> None:
    model = tiny_family(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    meter = Divergences(model, TOKENS, 2)
    assert meter.batches == 3
    tail = ["lm_head"] if not model.config.tie_word_embeddings else []
    asked = [*tail, "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj", "model.embed_tokens"]
    ordered = meter.ordered(asked)
    assert ordered == asked[::-1]
    ticks = []
    weights = {}
    for name in ordered:
        module = model.get_submodule(name)
        tried = [quantized_weight(name, module, {"scheme": "lut", "bits": bits}, None, 0) for bits in (2, 4)]
        found = meter.of(name, tried, lambda: ticks.append(1))
        assert found == pytest.approx([whole(model, {name: weight}) for weight in tried], rel=2e-3)
        assert found[0] > 3 * found[1] > 0
        weights[name] = tried[1]
    assert meter.together(weights, lambda: None) == pytest.approx(whole(model, weights), rel=2e-3)
    assert len(ticks) == 6 * len(asked)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_only_what_comes_behind_a_change_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_hidden_layers=3)
    meter = Divergences(model, TOKENS, 5)
    name = "model.layers.2.mlp.up_proj"
    weight = torch.zeros(96, 64)
    meter.of("model.layers.2.mlp.gate_proj", [weight], lambda: None)  # brings the stream there
    runs = []
    run = BlockStream.run
    monkeypatch.setattr(BlockStream, "run", lambda self, index, *rest: (runs.append(index), run(self, index, *rest))[1])
    meter.of(name, [weight, weight], lambda: None)
    assert runs == [2, 2]


def test_the_weight_is_that_of_a_snapped_module() -> None:
    model = tiny_model()
    dense = model.model.layers[0].mlp.up_proj
    spec = {"scheme": "lut_lowrank", "bits": 3}
    module = QuantLinear.quantize(dense, spec, None, 5)
    module.snap()
    assert torch.equal(quantized_weight("up", dense, spec, None, 5), module.dequantize())


def test_weights_come_back_after_an_error_and_a_module_that_cannot_be_fitted_is_named() -> None:
    model = tiny_model()
    head = model.lm_head.weight
    with pytest.raises(KeyError), replaced(model, {"model.embed_tokens": torch.zeros(320, 64)}):
        assert bool((head == 0).all())  # a tied head follows
        raise KeyError
    assert bool((head != 0).any())
    dense = model.model.layers[0].mlp.up_proj
    dense.weight.data[0, 0] = float("nan")
    with pytest.raises(StageError, match="up_proj"):
        quantized_weight("layers.0.up_proj", dense, {"scheme": "lut", "bits": 3}, None, 5)
