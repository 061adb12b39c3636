import pytest
import torch

from a1q.distill.divergence import cross_entropy, kl, partial_kl, precise_kl


def log_probs(distance, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(5, 200, dtype=torch.float64, generator=generator)
    q = p + distance * torch.randn(5, 200, dtype=torch.float64, generator=generator)
    return p.log_softmax(-1).to(dtype), q.log_softmax(-1).to(dtype)


@pytest.mark.parametrize("distance", [0.01, 1.0])
def test_three_ways_to_sum_one_divergence(distance):
    p, q = log_probs(distance)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    for definition in (kl, partial_kl, precise_kl):
        torch.testing.assert_close(definition(p, q), expected, rtol=1e-9, atol=1e-12)


def test_small_divergences_are_not_lost_in_rounding():
    p, q = log_probs(0.01, torch.float32)
    expected = precise_kl(*log_probs(0.01))
    # Rounding the log-probabilities to float32 moves single terms, and both signs of it average out.
    assert float((precise_kl(p, q) / expected - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_counts_the_positions_that_count(masked):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 20, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(20, (3, 8), generator=generator)
    counts = torch.rand(3, 8, generator=generator) < 0.5 if masked else None
    found = cross_entropy(logits.logsumexp(-1), logits.gather(-1, labels[..., None])[..., 0], counts)
    ignored = labels if counts is None else labels.masked_fill(~counts, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ignored.flatten(), ignore_index=-100)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def test_no_position_that_counts_gives_no_loss_and_no_nan():
    partition = torch.ones(2, 3, requires_grad=True)
    loss = cross_entropy(partition, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and partition.grad is not None and not partition.grad.any()
