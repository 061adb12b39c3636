import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.models.preparations.orthogonal import hadamard, random_orthogonal


@given(size=st.integers(1, 160), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_size_is_orthogonal_and_repeatable(size: int, seed: int) -> None:
    q = random_orthogonal(size, torch.Generator().manual_seed(seed))
    assert q.dtype == torch.float64
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(q, random_orthogonal(size, torch.Generator().manual_seed(seed)))


@given(core=st.sampled_from([1, 4, 8, 12, 20, 24, 28, 36, 44, 60]), doublings=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_hadamard_matrices_are_exact(core: int, doublings: int) -> None:
    size = core * 2**doublings
    h = hadamard(size)
    assert h is not None and bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [256, 640, 768, 896, 1024, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120])
def test_hidden_sizes_of_real_models_have_one(size: int) -> None:
    core = next(core for core in (12, 20, 28, 36) if size % core == 0) if size & (size - 1) else 64
    assert hadamard(core) is not None


@pytest.mark.parametrize("size", [3, 6, 7, 18, 92, 116])
def test_sizes_without_one_get_a_random_rotation(size: int) -> None:
    """Multiples of 4 below 92 all have a Paley matrix or a doubled one; 92 needs another construction."""
    assert hadamard(size) is None
    q = random_orthogonal(size, torch.Generator().manual_seed(0))
    assert q.abs().max() > 1.5 * size**-0.5


def test_one_large_coordinate_is_spread_evenly_over_all() -> None:
    q = random_orthogonal(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64), rtol=0, atol=1e-15)
    other = random_orthogonal(64, torch.Generator().manual_seed(1))
    assert not torch.equal(q, other)
