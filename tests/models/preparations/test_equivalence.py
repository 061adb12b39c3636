"""The gate: what it computes is the model's function, and every wrong fold is caught and placed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from a1q.errors import StageError
from a1q.models.preparations.equivalence import BOUND, HEAD, compare, require_equal, trace
from a1q.models.preparations.preparation import Decoder, prepare_model
from a1q.models.preparations.rotate_heads import RotateHeads
from a1q.models.preparations.rotate_residual import RotateResidual
from a1q.models.preparations.scale import Scale
from tests.models.preparations.techniques import TOKENS, fitting, made, squares_of
from tests.tiny import FAMILIES, tiny_family


def differences(model: Any, preparations: list[Any]) -> dict[str, float]:
    before = trace(model, TOKENS)
    prepare_model(model, preparations)
    return compare(before, trace(model, TOKENS), preparations)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_trace_is_what_transformers_computes_and_leaves_the_model_alone(model_type: str) -> None:
    model = tiny_family(model_type)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ticks: list[int] = []
    found = trace(model, TOKENS, lambda: ticks.append(1))
    assert list(found) == [
        "model.embed_tokens", *(f"model.layers.{i}" for i in range(model.config.num_hidden_layers)), HEAD,
    ]  # fmt: skip
    assert len(ticks) == len(found) and all(tensor.dtype == torch.float64 for tensor in found.values())
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in plain.items())
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        output = model(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(found[HEAD].float(), output.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["model.layers.0"].float(), output.hidden_states[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rounding_stays_far_below_the_bound(model_type: str) -> None:
    model = tiny_family(model_type)
    found = differences(model, made(model, fitting(model_type)))
    require_equal(found)
    assert 0 < max(found.values()) < BOUND / 50


class HeadsInTurn(RotateHeads):
    """Query head i reads kv head i mod kv_heads: the mistake that grouped-query attention invites."""

    def layer(self, decoder: Decoder, index: int) -> None:
        o = decoder.layers[index].self_attn.o_proj
        groups = (decoder.heads // decoder.kv_heads, decoder.kv_heads, -1)
        in_turn = o.weight.unflatten(1, groups).transpose(1, 2).flatten(1)
        o.weight.copy_(in_turn)
        super().layer(decoder, index)
        size = o.in_features // decoder.heads
        o.weight.copy_(o.weight.unflatten(1, (decoder.kv_heads, -1, size)).transpose(1, 2).flatten(1))


class OneHeadOnly(Scale):
    """o_proj is scaled for the first query head of each kv head alone."""

    def layer(self, decoder: Decoder, index: int) -> None:
        o = decoder.layers[index].self_attn.o_proj
        shape = (decoder.kv_heads, decoder.heads // decoder.kv_heads, -1)
        plain = o.weight.unflatten(1, shape)[:, :, 1:].clone()
        super().layer(decoder, index)
        o.weight.unflatten(1, shape)[:, :, 1:] = plain


class LaterOnly(HeadsInTurn):
    """The same mistake in the second layer alone."""

    def layer(self, decoder: Decoder, index: int) -> None:
        (super().layer if index else super(HeadsInTurn, self).layer)(decoder, index)


class FinalGainLost(RotateResidual):
    """The final norm's gains are set to 1 and not folded."""

    def ends(self, decoder: Decoder) -> None:
        decoder.set_gain(decoder.norm, torch.ones(len(self.rotation)))
        super().ends(decoder)


class EmbeddingLeft(RotateResidual):
    """The embedding is not rotated."""

    def ends(self, decoder: Decoder) -> None:
        decoder.untie()
        plain = decoder.embedding.weight.clone()
        super().ends(decoder)
        decoder.embedding.weight.copy_(plain)


class BiasLeft(RotateHeads):
    """The bias of v_proj is not rotated."""

    def layer(self, decoder: Decoder, index: int) -> None:
        bias = decoder.layers[index].self_attn.v_proj.bias
        plain = bias.clone()
        super().layer(decoder, index)
        bias.copy_(plain)


WRONG: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "query heads in turn": ("llama", lambda model: HeadsInTurn(1), "model.layers.0"),
    "one query head": ("llama", lambda model: OneHeadOnly(squares_of(model), 0.5), "model.layers.0"),
    "only in a later layer": ("llama", lambda model: LaterOnly(1), "model.layers.1"),
    "final gain": ("llama", lambda model: FinalGainLost(64, 1), HEAD),
    "embedding": ("qwen3", lambda model: EmbeddingLeft(64, 1), "model.embed_tokens"),
    "bias": ("qwen2", lambda model: BiasLeft(1), "model.layers.0"),
    "norms on the way to the stream": ("gemma3_text", lambda model: RotateResidual(64, 1), "model.layers.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_fold_is_refused_and_placed(case: str) -> None:
    model_type, technique, place = WRONG[case]
    model = tiny_family(model_type)
    with pytest.raises(StageError, match=rf"before: {place} is the first part whose output differs"):
        require_equal(differences(model, [technique(model)]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_differs(value: float) -> None:
    model = tiny_family("llama")
    before = trace(model, TOKENS)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(StageError, match=r"model\.layers\.1 is the first part"):
        require_equal(compare(before, trace(broken, TOKENS), []))
