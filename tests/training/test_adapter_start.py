import pytest
import torch

from a1q.training.adapter_start import DAMPING, nearest_of_rank

ROWS, COLUMNS = 12, 9


def setting(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An error, and the second moment of inputs that differ much in size and go together."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(50, COLUMNS, generator=random, dtype=torch.float64) * torch.logspace(-1, 1, COLUMNS)
    inputs = inputs + inputs.mean(dim=1, keepdim=True)
    return torch.randn(ROWS, COLUMNS, generator=random, dtype=torch.float64), inputs.T @ inputs / 50


def cost(error: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((error @ gram) * error).sum())


@pytest.mark.parametrize("rank", [1, 3, COLUMNS])
def test_no_gradient_is_left_and_no_other_start_ends_lower(rank: int) -> None:
    error, gram = setting()
    a, b = nearest_of_rank(error, gram, rank)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    parts = [part.double().requires_grad_() for part in (a, b)]
    left = error - parts[1] @ parts[0]
    found = ((left @ damped) * left).sum()
    found.backward()
    assert all(float(part.grad.norm()) <= 1e-5 * float(damped.norm() * error.norm()) for part in parts)
    random = torch.Generator().manual_seed(1)
    other = [torch.randn(part.shape, generator=random, dtype=torch.float64).requires_grad_() for part in parts]
    optimizer = torch.optim.LBFGS(other, max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        left = error - other[1] @ other[0]
        loss = ((left @ damped) * left).sum()
        loss.backward()
        return loss

    lowest = float(optimizer.step(closure))
    assert found.item() <= lowest * (1 + 1e-5) + 1e-6 * cost(error, damped)


def test_without_statistics_it_is_the_truncated_svd() -> None:
    error, gram = setting()
    a, b = nearest_of_rank(error, None, 4)
    left, sizes, right = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(b @ a, ((left[:, :4] * sizes[:4]) @ right[:4]).float())
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    weighed = [part.double() for part in nearest_of_rank(error, gram, 4)]
    assert cost(error - weighed[1] @ weighed[0], gram) < 0.9 * cost(error - b.double() @ a.double(), gram)


def test_inputs_that_never_occur_and_errors_that_are_nothing() -> None:
    error, gram = setting()
    gram[0] = gram[:, 0] = 0
    for start in (nearest_of_rank(error, gram, 2), nearest_of_rank(torch.zeros_like(error), gram, 2)):
        assert all(bool(torch.isfinite(part).all()) for part in start)
