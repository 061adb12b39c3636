"""The tiny families are worth testing on: many tokens predicted, most of them no copies of the input."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import FAMILIES, tiny_family, tiny_family_folder


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_predictions_are_many_and_no_copies(model_type: str, seed: int):
    model = tiny_family(model_type, seed)
    tokens = torch.randint(320, (1, 64), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        predicted = model(input_ids=tokens).logits[0].argmax(-1)
    assert len(set(predicted.tolist())) >= 16
    assert (predicted == tokens[0]).float().mean() < 0.5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_folder_loads_as_the_model(model_type: str, tmp_path):
    from a1q.models.checkpoint import load_model

    tokens = torch.arange(1, 30)[None]
    loaded = load_model(tiny_family_folder(tmp_path / "model", model_type))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, tiny_family(model_type)(tokens).logits, rtol=0, atol=0)
