"""Draws against the probabilities they should have, and against transformers' own processors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.generation.sampling import Sampler, Sampling, candidates

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05]))


def sampler(temperature: float, top_p: float, seed: int, **more) -> Sampler:
    return Sampler(Sampling(temperature, more.get("top_k", 0), top_p, more.get("penalty", 1.0)), seed)


def draws(choose, count=4000):
    return np.bincount([choose(LOGITS) for _ in range(count)], minlength=4) / count


def test_frequencies_are_those_of_the_model():
    np.testing.assert_allclose(draws(sampler(1.0, 1.0, 3)), [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_temperature():
    sharper = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(draws(sampler(0.5, 1.0, 3)), sharper / sharper.sum(), atol=0.03)
    assert {sampler(0.0, 1.0, seed)(LOGITS) for seed in range(5)} == {0}


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.94, 3), (1.0, 4)])
def test_the_likeliest_that_together_have_the_share(top_p, kept):
    assert (draws(sampler(1.0, top_p, 0)) > 0).tolist() == [i < kept for i in range(4)]


def test_same_seed_same_choices():
    first, again, other = (
        [s(LOGITS) for _ in range(30)] for s in (sampler(1, 1, 5), sampler(1, 1, 5), sampler(1, 1, 6))
    )
    assert first == again != other


@given(
    st.integers(0, 10_000),
    st.sampled_from([5, 300, 3000]),
    st.floats(0.2, 3),
    st.floats(0.05, 1),
    st.integers(0, 400),
    st.floats(0.5, 2),
)
@settings(max_examples=60, deadline=None)
def test_what_may_be_drawn_is_what_transformers_would_draw_from(seed, size, temperature, top_p, top_k, penalty):
    import torch
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = np.random.default_rng(seed)
    logits, seen = 3 * generator.standard_normal(size), generator.integers(size, size=4)
    processors = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    chain = LogitsProcessorList([*processors, TopPLogitsWarper(top_p)])
    wanted = chain(torch.from_numpy(seen)[None], torch.from_numpy(logits.copy())[None])[0].softmax(-1).numpy()
    choose = Sampler(Sampling(temperature, top_k, top_p, penalty), 0)
    drawn: list = []
    choose._random = type("Recorder", (), {"choice": lambda self, kept, p: drawn.append((kept, p)) or kept[0]})()
    choose(logits, seen.tolist())
    found = np.zeros(size)
    found[drawn[0][0]] = drawn[0][1]
    if np.flatnonzero(found).size != np.flatnonzero(wanted).size:  # a share that equals top_p but for rounding
        assert abs(np.flatnonzero(found).size - np.flatnonzero(wanted).size) == 1
        return
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_next_to_no_temperature_is_none():
    assert {sampler(1e-320, 0.95, seed)(LOGITS) for seed in range(20)} == {0}
    assert {sampler(1e-320, 1.0, seed)(LOGITS) for seed in range(20)} == {0}


def test_the_likeliest_with_a_penalty_is_another():
    assert sampler(0.0, 1.0, 0, penalty=3.0)(np.array([2.0, 1.0, -1.0]), [0]) == 1
    assert sampler(0.0, 1.0, 0, penalty=3.0)(np.array([-0.5, -1.0]), [0]) == 1
    assert sampler(0.0, 1.0, 0)(np.array([2.0, 1.0]), [0]) == 0


def test_wide_vocabularies_are_sorted_as_far_as_needed():
    logits = np.zeros(40_000)
    kept, shares = candidates(logits, Sampling(1.0, 0, 0.5, 1.0))
    assert len(kept) == 20_000 and shares.sum() == pytest.approx(1)
    kept, _ = candidates(logits, Sampling(1.0, 7, 1.0, 1.0))
    assert kept.tolist() == sorted(kept.tolist()) and len(kept) == 7
