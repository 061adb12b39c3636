import dataclasses
import json

import numpy as np
import pytest
import torch

from a1q.coreml.activations import LARGEST_FP16, LayerPeaks, Peaks, measure, residual_scale
from a1q.errors import StageError
from tests.tiny import FAMILIES, tiny_family

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 24)).astype(np.int32)
BEHIND = ("gemma3_text",)
"""Families with norms behind their branches."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = tiny_family(request.param)
    return request.param, model, measure(model, TOKENS)


def test_the_stream_is_what_transformers_calls_hidden_states(family):
    _, model, peaks = family
    with torch.no_grad():
        # the last of the hidden states is behind the final norm
        states = model(torch.from_numpy(TOKENS).long(), output_hidden_states=True).hidden_states[:-1]
    for layer, state in zip(peaks.layers, states, strict=True):
        assert layer.residual == pytest.approx(state.abs().max().item(), rel=1e-5)
    for before, after in zip(peaks.layers, peaks.layers[1:], strict=False):
        assert before.residual_end == after.residual


def test_the_branches_of_the_first_layer_computed_by_hand(family):
    """Module by module, in the order of the model's code, with nothing of its own attention but the product."""
    model_type, model, peaks = family
    layer, first = model.model.layers[0], peaks.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    seen = {}
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.setdefault("mixed", args[0]))
    with torch.no_grad():
        x = model(torch.from_numpy(TOKENS).long(), output_hidden_states=True).hidden_states[0]
        normed = layer.input_layernorm(x)
        heads = (*normed.shape[:2], -1, 32)
        query, key = attention.q_proj(normed).view(heads), attention.k_proj(normed).view(heads)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        mixed = seen["mixed"]
        attended = added = attention.o_proj(mixed)
        behind = model_type in BEHIND
        if behind:
            added = layer.post_attention_layernorm(attended)
        middle = x + added
        y = (layer.pre_feedforward_layernorm if behind else layer.post_attention_layernorm)(middle)
        product = mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y)
        down = product_added = mlp.down_proj(product)
        if behind:
            product_added = layer.post_feedforward_layernorm(down)
    handle.remove()
    expected = LayerPeaks(
        *(
            tensor.abs().max().item()
            for tensor in (
                x, query, key, mixed, attended, added, middle, product, down, product_added, middle + product_added,
            )
        )
    )  # fmt: skip
    assert dataclasses.astuple(first) == pytest.approx(dataclasses.astuple(expected), rel=1e-4)


def test_measuring_leaves_no_hook_and_the_mode(family):
    _, model, _ = family

    def hooks() -> int:  # transformers may have some of its own
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    model.train()
    measure(model, TOKENS[:1, :4])
    assert model.training
    model.eval()
    assert hooks() == before


def test_the_largest_of_all_sequences_counts():
    model = tiny_family("qwen3")
    single = [measure(model, TOKENS[index : index + 1]) for index in (0, 1)]
    both = measure(model, TOKENS)
    for index, layer in enumerate(both.layers):
        expected = np.maximum(*(dataclasses.astuple(peaks.layers[index]) for peaks in single))
        assert dataclasses.astuple(layer) == pytest.approx(expected.tolist())
    assert both.tokens == 48 and both.logits == max(peaks.logits for peaks in single)


def test_a_quantized_model_is_measured_as_it_computes():
    from a1q.quant.linear import QuantLinear, swap_module

    model = tiny_family("qwen2")
    name = "model.layers.1.mlp.down_proj"
    before = measure(model, TOKENS)
    module = QuantLinear.quantize(model.get_submodule(name), {"scheme": "lut", "bits": 2, "granularity": "tensor"})
    swap_module(model, name, module)
    after = measure(model, TOKENS)
    assert after.layers[1].product == before.layers[1].product
    assert after.layers[1].product_output != before.layers[1].product_output


def test_not_finite_is_told_with_the_layer():
    model = tiny_family("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(StageError, match=r"layer 1: product output is not finite"):
        measure(model, TOKENS)


def _peaks(**changes: float) -> Peaks:
    quiet = {field.name: 1.0 for field in dataclasses.fields(LayerPeaks)}
    return Peaks(8, (LayerPeaks(**quiet), LayerPeaks(**{**quiet, **changes})), 30.0)


@pytest.mark.parametrize(
    ("peak", "expected"), [(1.0, 1.0), (8188.0, 1.0), (8189.0, 0.5), (65504.0, 0.125), (120000.0, 0.0625)]
)
@pytest.mark.parametrize("name", ["residual", "attention_output", "product", "product_added", "residual_end"])
def test_the_scale_is_the_largest_power_of_two_that_keeps_the_margin(name: str, peak: float, expected: float):
    scale = residual_scale(_peaks(**{name: peak}))
    assert scale == expected
    assert peak * scale * 8 <= LARGEST_FP16 and (scale == 1 or peak * scale * 16 > LARGEST_FP16)


def test_what_no_residual_scale_lowers_is_named():
    peaks = _peaks(query=80000.0, residual=90000.0)
    assert peaks.beyond() == ["layer 1: query 80000"]
    assert residual_scale(_peaks(query=80000.0)) == 1.0


def test_peaks_go_into_json():
    peaks = _peaks(query=2.5)
    found = json.loads(json.dumps(peaks.as_json()))
    assert found["layers"][1]["query"] == 2.5 and found["tokens"] == 8
