"""Weighted k-means against the exact optimum by dynamic programming."""

import numpy as np
import torch

from a1q.quant.grid import lookup, nearest
from a1q.quant.kmeans import lloyd, quantile_start


def exact_cost(values: np.ndarray, use: np.ndarray, count: int) -> float:
    """Least weighted squared error of `count` entries: optimal cells are intervals of the sorted values."""
    order = np.argsort(values)
    x, w = values[order], use[order]
    mass, first, second = (np.concatenate([[0], np.cumsum(w * x**power)]) for power in (0, 1, 2))

    def cost(start: int, end: int) -> float:
        total = mass[end] - mass[start]
        return second[end] - second[start] - (first[end] - first[start]) ** 2 / total

    best = [0.0] + [np.inf] * len(x)
    for _ in range(count):
        best = [0.0] + [min(best[s] + cost(s, e) for s in range(e)) for e in range(1, len(x) + 1)]
    return float(best[-1])


def test_close_to_the_exact_optimum() -> None:
    rng = np.random.default_rng(3)
    values, use = rng.normal(size=200), rng.uniform(0.1, 3, 200)
    x, w = torch.from_numpy(values)[None], torch.from_numpy(use)[None]
    lut = lloyd(x, w, quantile_start(x, 4), rounds=100)
    cost = float((w * (x - lookup(lut, nearest(x, lut))).square()).sum())
    assert exact_cost(values, use, 4) <= cost <= 1.05 * exact_cost(values, use, 4)


def test_tables_of_blocks_are_independent() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(6, 50, generator=generator) * torch.tensor([1, 1, 5, 5, 20, 20])[:, None]
    use = torch.rand(6, 50, generator=generator)
    together = lloyd(values, use, quantile_start(values.reshape(3, -1), 8), rounds=30)
    for block in range(3):
        part = slice(2 * block, 2 * block + 2)
        alone = lloyd(values[part], use[part], quantile_start(values[part].reshape(1, -1), 8), rounds=30)
        torch.testing.assert_close(together[block], alone[0], rtol=1e-5, atol=1e-6)


def test_fewer_values_than_entries() -> None:
    values = torch.tensor([[-1.0, 2.0, -1.0, 2.0]])
    lut = lloyd(values, torch.ones_like(values), quantile_start(values, 8), rounds=10)
    assert torch.equal(lookup(lut, nearest(values, lut)), values)


def test_a_sample_of_a_large_table_gives_nearly_the_same_entries(monkeypatch):
    from a1q.quant import kmeans

    values = torch.randn(96, 512, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 512)
    use = torch.rand(96, 512, generator=torch.Generator().manual_seed(1))
    start = quantile_start(values.reshape(1, -1), 16)
    whole = lloyd(values, use, start, 100)
    monkeypatch.setattr(kmeans, "CLUSTERED", 8192)
    thinned, _ = kmeans._thinned(values, use, 1)
    assert thinned.shape[0] == 1 and 6000 < thinned.shape[1] <= 8192
    sampled = lloyd(values, use, start, 100)

    def error(lut):
        return float((use * (values - lookup(lut, nearest(values, lut))).square()).sum())

    assert error(whole) <= error(sampled) < 1.05 * error(whole)
