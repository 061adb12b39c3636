import numpy as np
import pytest
import torch
from torch import nn

from a1q.errors import StageError
from a1q.models.blocks import BlockStream
from a1q.quant.linear import QuantLinear
from a1q.quant.tied import swap_module
from tests.tiny import FAMILIES, tiny_family, tiny_model

TOKENS = np.random.default_rng(0).integers(320, size=(5, 24)).astype(np.int32)


def logits(model, tokens: np.ndarray, batch_size: int) -> list[torch.Tensor]:
    stream = BlockStream(model, tokens, batch_size)
    for index in range(len(stream.names)):
        stream.advance(index)
    with torch.no_grad():
        return [model.get_output_embeddings()(stream.leave(number)) for number in range(len(stream.hidden))]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_give_what_the_model_gives(family: str) -> None:
    model = tiny_family(family)
    for batch_size in (2, 5):
        for number, found in enumerate(logits(model, TOKENS, batch_size)):
            ids = torch.from_numpy(TOKENS[number * batch_size : (number + 1) * batch_size]).long()
            with torch.no_grad():
                assert torch.equal(found, model(input_ids=ids, use_cache=False).logits)
    assert not any("forward" in vars(module) for module in model.modules())


def test_logits_of_other_states_are_the_models_with_its_own_head() -> None:
    model = tiny_model()
    stream = BlockStream(model, TOKENS, 3)
    states = torch.randn(2, 24, 64)
    with torch.no_grad():
        assert torch.equal(stream.logits(states, 1), model.lm_head(model.model.norm(states)))


def test_the_states_between_are_those_of_the_model() -> None:
    model = tiny_family("gemma3_text")
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS).long(), output_hidden_states=True, use_cache=False).hidden_states
    stream = BlockStream(model, TOKENS, 3)
    assert stream.names == [f"model.layers.{index}" for index in range(3)]
    done: list[int] = []
    for index in range(3):
        assert [states.shape[0] for states in stream.hidden] == [3, 2]
        assert torch.equal(stream.hidden[1], expected[index][3:])
        stream.advance(index, done.append)
    assert done == [1, 2] * 3


def test_blocks_may_change_and_gradients_reach_them() -> None:
    model = tiny_model()
    stream = BlockStream(model, TOKENS, 5)
    name = f"{stream.names[0]}.mlp.up_proj"
    swap_module(model, name, QuantLinear.quantize(model.get_submodule(name), {"scheme": "lut", "bits": 3}))
    out = stream.run(0, stream.hidden[0], 0)
    out.square().mean().backward()
    assert model.get_submodule(name).latent.grad.abs().sum() > 0
    for index in (0, 1):
        stream.advance(index)
    with torch.no_grad():
        found = model.lm_head(stream.leave(0))
        assert torch.equal(found, model(torch.from_numpy(TOKENS).long(), use_cache=False).logits)


def test_a_model_without_layers_is_refused() -> None:
    model = tiny_model()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(StageError, match="no list of 2 decoder layers"):
        BlockStream(model, TOKENS, 2)
