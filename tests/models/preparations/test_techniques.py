"""Every technique on every family: the same function in float64, and what it is meant to do to the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.models.preparations.equivalence import HEAD, trace
from a1q.models.preparations.families import FAMILIES
from a1q.models.preparations.preparation import prepare_model
from a1q.models.preparations.rotate_heads import RotateHeads
from a1q.models.preparations.rotate_residual import RotateResidual
from a1q.models.preparations.scale import Scale, measured
from tests.models.preparations.techniques import TECHNIQUES, TOKENS, fitting, made, squares_of
from tests.tiny import FAMILIES as TINY
from tests.tiny import tiny_family

EVERY = [(model_type, name) for model_type in TINY for name in fitting(model_type)]


def biased(model: Any) -> Any:
    """The model with biases of any size wherever its linears have one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_(0, 0.3)
    return model


def assert_same_function(model: Any, names: list[str]) -> Any:
    """Prepare a copy in float64 and compare all logits; the copy."""
    model = model.double()
    prepared = copy.deepcopy(model)
    prepare_model(prepared, made(prepared, names))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), prepared.parameters(), strict=False))
    expected, found = trace(model, TOKENS)[HEAD], trace(prepared, TOKENS)[HEAD]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # as transformers computes it, with norms in float32
        plain = prepared(TOKENS).logits
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    return prepared


def test_families_are_those_of_the_tiny_models() -> None:
    assert set(FAMILIES) == set(TINY)


@pytest.mark.parametrize(("model_type", "name"), EVERY)
def test_the_function_stays(model_type: str, name: str) -> None:
    assert_same_function(tiny_family(model_type), [name])


@pytest.mark.parametrize("model_type", TINY)
def test_all_together(model_type: str) -> None:
    assert_same_function(tiny_family(model_type), fitting(model_type))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_biases_of_every_linear(name: str) -> None:
    model = tiny_family("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    assert biased(model).model.layers[0].mlp.down_proj.bias is not None
    assert_same_function(model, [name])


@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 7).map(lambda half: 2 * half),
    width=st.integers(1, 12),
    intermediate=st.integers(3, 30),
    model_type=st.sampled_from(["qwen3", "gemma3_text"]),
)
@settings(max_examples=15, deadline=None)
def test_any_size(kv_heads: int, group: int, head_dim: int, width: int, intermediate: int, model_type: str) -> None:
    model = tiny_family(
        model_type,
        hidden_size=kv_heads * group * width,
        intermediate_size=intermediate,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    assert_same_function(model, fitting(model_type))


@pytest.mark.parametrize("tied", [True, False])
def test_rotation_of_the_stream_unties_and_folds_every_gain(tied: bool) -> None:
    model = tiny_family("llama", tie_word_embeddings=tied)
    prepared = assert_same_function(model, ["rotate_residual"])
    assert prepared.lm_head.weight is not prepared.model.embed_tokens.weight
    assert prepared.config.tie_word_embeddings is False
    prepared.tie_weights()
    assert prepared.lm_head.weight is not prepared.model.embed_tokens.weight
    norms = [module for module in prepared.modules() if "Norm" in type(module).__name__]
    assert len(norms) == 5 and all(bool((norm.weight == 1).all()) for norm in norms)


def test_rotation_of_the_stream_leaves_the_norms_of_heads() -> None:
    model = tiny_family("qwen3")
    expected = model.model.layers[0].self_attn.q_norm.weight.double()
    prepared = assert_same_function(model, ["rotate_residual"])
    assert torch.equal(prepared.model.layers[0].self_attn.q_norm.weight, expected)


def test_an_outlier_channel_of_the_stream_is_spread() -> None:
    model = tiny_family("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[7] *= 50
    before = model.model.layers[0].mlp.down_proj.weight.abs().max()
    prepare_model(model, [RotateResidual(64, 0)])
    assert model.model.layers[0].mlp.down_proj.weight.abs().max() < before / 4


def test_weights_are_rounded_once() -> None:
    """Two rotations of v_proj's weights in one go are nearer to the exact ones than float32 after each would be."""
    model = tiny_family("llama")
    exact = copy.deepcopy(model).double()
    prepare_model(exact, made(exact, ["rotate_residual", "rotate_heads"]))
    prepare_model(model, made(model, ["rotate_residual", "rotate_heads"]))
    assert model.dtype == torch.float32
    for found, expected in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(found, expected.float())


def test_kv_heads_and_layers_have_rotations_of_their_own() -> None:
    model = tiny_family("llama")
    plain = copy.deepcopy(model)
    prepare_model(model, [RotateHeads(0)])
    found = []
    for layer, old in zip(model.model.layers, plain.model.layers, strict=True):
        new, before = (item.self_attn.v_proj.weight.detach().unflatten(0, (2, 32)) for item in (layer, old))
        found += [torch.linalg.lstsq(before[head].T, new[head].T).solution for head in range(2)]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_scaling_evens_out_the_inputs(model_type: str) -> None:
    """With alpha 1 every input channel of the scaled linears has the same rms, a channel of v over all its heads."""
    model = tiny_family(model_type).double()
    before = squares_seen(model)
    assert all(square.max() > 2 * square.mean() for square in before.values())
    prepare_model(model, [Scale(before, alpha=1.0)])
    for name, square in squares_seen(model).items():
        if name.endswith("o_proj"):
            square = square.unflatten(0, (model.config.num_key_value_heads, -1, 32)).mean(1).flatten()
        torch.testing.assert_close(square, square.mean().expand(len(square)), rtol=1e-5, atol=0)


def squares_seen(model: Any) -> dict[str, torch.Tensor]:
    """E[x²] [in] of the linears that `Scale` asks for."""
    seen: dict[str, torch.Tensor] = {}

    def listen(name: str) -> Any:
        def keep(_: Any, inputs: Any) -> None:
            seen[name] = inputs[0].square().flatten(0, -2).mean(0)

        return model.get_submodule(name).register_forward_pre_hook(keep)

    hooks = [listen(name) for name in measured(model.config.num_hidden_layers)]
    trace(model, TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


def test_no_alpha_no_change() -> None:
    model = tiny_family("qwen2")
    plain = copy.deepcopy(model)
    prepare_model(model, [Scale(squares_of(model), alpha=0.0)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
