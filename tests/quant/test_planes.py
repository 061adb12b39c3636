"""Products with bytes against float64, with fbgemm where it works and without."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.quant import planes
from a1q.quant.planes import BASE, DIGITS, LARGEST_DIGIT, Planes, digits_of, fbgemm_works

KINDS = [
    pytest.param(True, marks=pytest.mark.skipif(not fbgemm_works(), reason="no fbgemm here"), id="fbgemm"),
    pytest.param(False, id="plain"),
]
each_kind = pytest.mark.parametrize("fast", KINDS)


def weight(count: int, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    octets = torch.randint(-128, 128, (count, rows, columns), dtype=torch.int8, generator=generator)
    return octets, torch.rand(count, rows, generator=generator).double() * 0.01 + 1e-4


def exact(octets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The planes [count, rows, columns] as they add up."""
    return octets.double() * scales[..., None]


def require_product(
    found: torch.Tensor,
    x: torch.Tensor,
    full: torch.Tensor,
    shift: torch.Tensor | None = None,
    rounding: float = 3e-7,
) -> None:
    """Within what rounding x to 2⁻²¹ of its largest number and float32 arithmetic may miss."""
    full, planes_size = full.sum(0), full.abs().sum(0)
    whole = x.double() @ full.T
    size = x.double().abs() @ planes_size.T
    if shift is not None:
        whole += x.double().sum(-1, keepdim=True) * shift.double()
        size += x.double().abs().sum(-1, keepdim=True) * shift.double().abs()
    allowed = 2.0**-21 * x.double().abs().amax(-1, keepdim=True) * full.abs().sum(1) + rounding * size
    assert found.dtype == torch.float32
    assert bool(((found.double() - whole).abs() <= allowed).all())


@each_kind
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (40, 64), (129, 257)])
@pytest.mark.parametrize("leading", [(), (1, 1), (2, 3)])
def test_products_are_those_of_float64(
    fast: bool, count: int, shape: tuple[int, int], leading: tuple[int, ...]
) -> None:
    octets, scales = weight(count, *shape)
    shift = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    x = torch.randn(*leading, shape[1], generator=torch.Generator().manual_seed(2))
    blocks = [(octets[:, rows], scales[:, rows]) for rows in torch.arange(shape[0]).tensor_split(3) if len(rows)]
    for told in (None, shift):
        held = Planes(iter(blocks), told, fast)
        found = held.product(x)
        assert found.shape == (*leading, shape[0])
        assert (held.out_features, held.in_features, held.count) == (*shape, count)
        require_product(found, x, exact(octets, scales), told)


@each_kind
def test_the_largest_products_do_not_saturate(fast: bool) -> None:
    columns = 3072
    octets = torch.stack([torch.full((4, columns), -128), torch.full((4, columns), 127)]).to(torch.int8)
    octets[:, 1, ::2] = 127
    octets[:, 2, 1::3] = -128
    ones = torch.ones(2, 4).double()
    x = torch.stack([torch.full((columns,), 3.7), torch.full((columns,), -3.7)])
    x = torch.cat([x, x[:1] * torch.tensor([1.0, -1.0]).repeat(columns // 2)])
    rounding = 3e-7 if fast else 2e-5  # thousands of equal floats add up badly; whole numbers don't
    require_product(Planes([(octets, ones)], fast=fast).product(x), x, exact(octets, ones), rounding=rounding)


@each_kind
def test_positions_do_not_see_each_other(fast: bool) -> None:
    octets, scales = weight(1, 7, 16)
    held = Planes([(octets, scales)], fast=fast)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-25], [1.0], [1e25], [0.0]])
    for row in x:
        require_product(held.product(row), row, exact(octets, scales))
    torch.testing.assert_close(held.product(x), torch.stack([held.product(row) for row in x]), rtol=1e-6, atol=0)
    assert bool((held.product(x)[3] == 0).all())
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    found = held.product(x)
    assert bool(found[1:3].isfinite().logical_not().all())
    assert bool(found[0].isfinite().all())


@each_kind
def test_many_positions_come_in_parts(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    octets, scales = weight(2, 9, 12)
    held = Planes([(octets, scales)], fast=fast)
    x = torch.randn(23, 12, generator=torch.Generator().manual_seed(0))
    whole = held.product(x)
    monkeypatch.setattr(planes, "FEW", 3 * 2 * 9 * 5)
    monkeypatch.setattr(planes, "UPCAST", 24)
    torch.testing.assert_close(held.product(x), whole, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_digits_say_the_numbers(numbers: list[float]) -> None:
    x = torch.tensor([numbers])
    peak = x.abs().amax(1, keepdim=True).clamp_min(planes.LEAST)
    digits = digits_of(x, peak)
    assert digits.shape == (DIGITS, 1, len(numbers))
    assert bool((digits == digits.round()).all())
    assert float(digits.abs().max()) <= LARGEST_DIGIT
    worth = torch.tensor([BASE**-digit / LARGEST_DIGIT for digit in range(DIGITS)], dtype=torch.float64)
    again = (digits.double() * worth[:, None, None]).sum(0) * peak.double()
    assert float((again - x.double()).abs().max()) <= 1.26 * 2.0**-21 * float(peak)  # 1/4 of it: float32


def test_packing_leaves_the_engine_as_it_was() -> None:
    before = torch.backends.quantized.engine
    Planes([weight(1, 4, 8)])
    assert torch.backends.quantized.engine == before


MEMORY = """
import ctypes, gc, sys, torch
from a1q.quant.planes import Planes
def held():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def block():
    return torch.zeros(2, 1024, 2048, dtype=torch.int8) + 1, torch.ones(2, 1024).double()
Planes([block()]).product(torch.ones(2048))
before = held()
made = [Planes(block() for _ in range(2)) for _ in range(8)]
print(held() - before, sum(item.nbytes for item in made))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_bytes_counted_are_bytes_held() -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, check=True)
    grown, counted = map(int, run.stdout.split())
    assert counted > 64 << 20
    assert grown == pytest.approx(counted, rel=0.08)
