from __future__ import annotations

import numpy as np
import pytest
import torch

from a1q.coreml.figures import Tally, log_softmax

RNG = np.random.default_rng(0)
EXPECTED = RNG.standard_normal((5, 40)).astype(np.float32)
FOUND = EXPECTED + 0.05 * RNG.standard_normal((5, 40)).astype(np.float32)


def figures(expected, found, rounded=None):
    tally = Tally()
    for row, exact, other in zip(expected, expected if rounded is None else rounded, found, strict=True):
        tally.add(row, exact, other)
    return tally.figures(1.0, 1.0, {})


def test_against_torch():
    from torch.nn import functional

    result = figures(EXPECTED, FOUND)
    p, q = (torch.from_numpy(x.astype(np.float64)) for x in (EXPECTED, FOUND))
    cosine = functional.cosine_similarity(p, q)
    assert result.cosine == pytest.approx(cosine.min().item(), rel=1e-12)
    assert result.cosine_mean == pytest.approx(cosine.mean().item(), rel=1e-12)
    assert result.max_error == pytest.approx((p - q).abs().max().item())
    kl = functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert result.kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert result.kl_max == pytest.approx(kl.max().item(), rel=1e-9)
    assert result.relative_error == pytest.approx(((p - q).abs().amax(1) / p.std(1, correction=0)).max().item())
    assert result.agreement == (p.argmax(1) == q.argmax(1)).double().mean().item()
    top = p.topk(2, 1).values
    assert result.decisive == ((top[:, 0] - top[:, 1]) > 4 * result.max_error).double().mean().item()


def test_the_relative_error_is_that_to_the_rounded_model():
    assert figures(EXPECTED, FOUND, rounded=FOUND).relative_error == 0


def test_a_changed_first_choice_where_it_leads():
    expected = np.array([[0, 10, 0, 0], [0, 0, 8, 0.0]])
    found = np.array([[0, 10, 0, 0], [0, 0.1, 8, 0.0]])
    same = figures(expected, found)
    assert (same.agreement, same.decisive, same.decisive_agreement) == (1, 1, 1)
    found[1, 1] = 9
    other = figures(expected, found)
    assert (other.agreement, other.decisive, other.decisive_agreement) == (0.5, 0, 1)


def test_what_is_not_finite():
    found = FOUND.copy()
    found[2, 3] = np.nan
    result = figures(EXPECTED, found)
    assert result.cosine == 0 and result.max_error == np.inf and result.decisive == 0
    assert result.as_json()["kl"] is None


def test_equal_logits_without_spread():
    flat = np.zeros((1, 4), np.float32)
    assert figures(flat, flat).cosine == 1 and figures(flat, flat).relative_error == 0
    assert figures(flat, flat + 1).relative_error == np.inf


def test_log_softmax_of_large_numbers():
    assert np.exp(log_softmax(np.array([1e4, 1e4 - 1]))).sum() == pytest.approx(1)
