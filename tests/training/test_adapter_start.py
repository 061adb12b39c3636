import pytest
import torch
from torch import nn

from a1q.quant.linear import QuantLinear
from a1q.training.adapter_start import DAMPING, error_adapters, nearest_of_rank

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


def test_inputs_that_never_occur() -> None:
    error, gram = setting()
    gram[0] = gram[:, 0] = 0
    assert all(bool(torch.isfinite(part).all()) for part in nearest_of_rank(error, gram, 2))


def test_a_module_that_lost_nothing_is_left_out() -> None:
    """Its adapter begins at random: zeros on both sides have no gradient."""
    spec = {"scheme": "balanced", "bits": 2}
    dense = nn.ModuleDict({name: nn.Linear(COLUMNS, ROWS, bias=False) for name in ("exact", "rounded")})
    modules = {name: QuantLinear.quantize(dense[name], spec, keep_latent=False) for name in dense}
    dense["exact"].weight.data = modules["exact"].dequantize()
    told: list[tuple[int, int]] = []
    found = error_adapters(modules, dense, None, 2, lambda step, total: told.append((step, total)))
    assert set(found) == {"rounded"} and told == [(1, 2), (2, 2)]
    a, b = found["rounded"]
    lost = dense["rounded"].weight.detach() - modules["rounded"].dequantize()
    assert float((lost - b @ a).norm()) < float(lost.norm())
