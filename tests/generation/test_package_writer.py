from __future__ import annotations

import numpy as np
import pytest

from a1q.coreml.runner import InterpreterBackend, make_runner
from a1q.coreml.writing import Sampler, write
from a1q.errors import StageError
from tests.coreml.bundles import bundle_of
from tests.coreml.models import SCHEMES, decoder

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05]))


def draws(sampler, count=4000):
    return np.bincount([sampler(LOGITS) for _ in range(count)], minlength=4) / count


def test_frequencies_are_those_of_the_model():
    np.testing.assert_allclose(draws(Sampler(1.0, 1.0, 3)), [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_temperature():
    sharper = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(draws(Sampler(0.5, 1.0, 3)), sharper / sharper.sum(), atol=0.03)
    assert {Sampler(0.0, 1.0, seed)(LOGITS) for seed in range(5)} == {0}


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.94, 3), (1.0, 4)])
def test_the_likeliest_that_together_have_the_share(top_p, kept):
    """As transformers' own filter keeps them."""
    import torch
    from transformers import TopPLogitsWarper

    assert (draws(Sampler(1.0, top_p, 0)) > 0).tolist() == [i < kept for i in range(4)]
    theirs = TopPLogitsWarper(top_p)(torch.zeros(1, 1), torch.from_numpy(LOGITS[None]).float())
    assert int(torch.isfinite(theirs).sum()) == kept


def test_same_seed_same_choices():
    first, again, other = (
        [s(LOGITS) for _ in range(30)] for s in (Sampler(1, 1, 5), Sampler(1, 1, 5), Sampler(1, 1, 6))
    )
    assert first == again != other


class Fixed:
    """A runner that always gives the same logits."""

    def __init__(self, logits):
        self.logits = np.array(logits, np.float32)
        self.steps = []

    def prefill(self, tokens):
        return self.logits

    def step(self, token):
        self.steps.append(token)
        return self.logits


def test_the_end_of_the_text_is_given_and_ends_it():
    runner = Fixed([0, 1, 0])
    assert list(write(runner, [5], 9, {1}, Sampler(0, 1, 0))) == [1]
    assert list(write(runner, [5], 3, {2}, Sampler(0, 1, 0))) == [1, 1, 1]
    assert runner.steps == [1, 1], "the last token is not fed"


def test_logits_that_are_not_finite():
    with pytest.raises(StageError, match="token 1 has logits that are not finite"):
        list(write(Fixed([0, np.nan]), [5], 3, set(), Sampler(0, 1, 0)))


@pytest.mark.parametrize("layout", ["single", "anemll"])
def test_a_package_writes_what_its_model_writes(tmp_path, layout):
    import torch

    model, prompt = decoder(SCHEMES["rank-1"]), [5, 9, 200, 31]
    bundle = bundle_of(model, tmp_path, layout)
    found = list(write(make_runner(bundle, InterpreterBackend(bundle, "fp32")), prompt, 40, set(), Sampler(0, 1, 0)))
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(40):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert found == tokens[4:]
