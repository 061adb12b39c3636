"""What Apple-style modules mean, against the formulas of `tests.importing.formats` in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a1q.errors import MismatchError
from a1q.importing.balanced import read_balanced
from a1q.importing.checkpoint import Stored
from a1q.quant.build import make_scheme
from tests.importing.formats import Written, apple
from tests.importing.test_v1 import exact

NAME = "model.layers.0.self_attn.q_proj"


def stored(written: Written, name: str = NAME) -> Stored:
    start = f"{name}."
    parts = {key.removeprefix(start): value for key, value in written.state.items() if key.startswith(start)}
    return Stored(name, "balanced", parts)


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_are_those_of_the_checkpoint(bits):
    written = apple(bits)
    for name, weight in written.weights.items():
        meaning = read_balanced(stored(written, name))
        assert np.array_equal(meaning.parts["indices"].numpy(), written.indices[name])
        assert np.abs(exact(meaning) - weight).max() <= 1e-14
        assert torch.equal(make_scheme(meaning.spec).assign(meaning.parts, meaning.latent), meaning.parts["indices"])


def test_a_weight_between_two_levels_goes_where_theirs_does():
    """They round halves to even numbers; a1q's grid rounds them down, so that the latent has to move."""
    weight = torch.tensor([[2.0, 0.0, -1.0, 1.0, 0.5, -2.0]])
    parameter = torch.log(torch.expm1(torch.tensor(1.0, dtype=torch.float64) - 1e-8))  # f = 1, s = 1
    parts = {"weight": weight, "_f_param": parameter, "_qat_nbits": torch.tensor(2)}
    meaning = read_balanced(Stored("m", "balanced", parts))
    assert exact(meaning).round(6).tolist() == [[1.5, -0.5, -0.5, 1.5, 0.5, -1.5]]
    assert torch.equal(make_scheme(meaning.spec).assign(meaning.parts, meaning.latent), meaning.parts["indices"])


def test_other_bits_are_refused():
    written = apple()
    written.state[f"{NAME}._qat_nbits"] = torch.tensor(3)
    with pytest.raises(MismatchError, match="_qat_nbits is 3, expected 2 or 4"):
        read_balanced(stored(written))
