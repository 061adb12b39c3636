"""What is said of tables, scales and fp16, against plain counting."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from a1q.looking import numbers
from a1q.looking.numbers import half_of, numbers_of, scale_range, table_use
from a1q.looking.windows import windows
from a1q.quant.linear import QuantLinear

SPECS = [
    {"scheme": "lut", "bits": 2},
    {"scheme": "lut", "bits": 3, "granularity": "channel"},
    {"scheme": "lut_lowrank", "bits": 2, "rank": 2},
    {"scheme": "balanced", "bits": 2},
    {"scheme": "affine", "bits": 4},
    {"scheme": "vector_lut", "bits": 2},
]


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 4]), st.booleans(), st.integers(0, 1000))
def test_use_is_what_counting_says(tables: int, rows: int, entries: int, interleaved: bool, seed: int) -> None:
    indices = np.random.default_rng(seed).integers(entries, size=(tables * rows, 5)).astype(np.uint8)
    found = table_use(torch.from_numpy(indices), torch.zeros(tables, entries), interleaved)
    dead, bits = 0, 0.0
    for table in range(tables):
        own = indices[table::tables] if interleaved else indices[table * rows : (table + 1) * rows]
        shares = np.bincount(own.ravel(), minlength=entries) / own.size
        dead += int((shares == 0).sum())
        bits += -sum(share * math.log2(share) for share in shares if share)
    assert (found.dead, found.tables, found.entries) == (dead, tables, entries)
    assert found.entropy == pytest.approx(bits / tables)


def test_ranges_are_those_of_the_whole_scale() -> None:
    torch.manual_seed(0)
    rows, columns = torch.randn(1500, 3), torch.randn(3, 7)
    found = scale_range(rows, columns, (1500, 7))
    scale = rows @ columns
    assert found is not None
    assert (found.least, found.most) == pytest.approx((float(scale.abs().min()), float(scale.abs().max())))
    assert found.negative == pytest.approx(float((scale < 0).float().mean()))
    assert scale_range(None, None, (3, 4)) is None
    only = scale_range(None, torch.tensor([[-2.0, 3.0]]), (4, 2))
    assert only is not None and (only.least, only.most, only.negative) == (2.0, 3.0, 0.5)


def test_numbers_that_fp16_can_and_cannot_hold() -> None:
    found = half_of([torch.tensor([1.0, 70000.0, 1e-6]), torch.tensor([[0.0, 1 + 2**-12]]), torch.tensor([3])])
    assert found.beyond == 1 and found.subnormal == pytest.approx(0.2)
    exact = half_of([torch.tensor([1.0, 0.5, 0.0])])
    assert (exact.beyond, exact.subnormal, exact.rounding) == (0, 0.0, 0.0)
    assert half_of([torch.zeros(0)]) == half_of([])
    assert found.rounding == pytest.approx(
        float(np.sqrt(np.mean([0.0, (np.float16(1e-6) / np.float32(1e-6) - 1) ** 2, (2**-12 / (1 + 2**-12)) ** 2]))),
        rel=1e-3,
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["scheme"])
def test_every_scheme_can_be_looked_at_before_and_after_snap(spec: dict) -> None:
    torch.manual_seed(0)
    module = QuantLinear.quantize(nn.Linear(16, 8, bias=False), spec, keep_latent=False)
    for _ in range(2):
        found = numbers_of(module)
        assert found.finite and found.largest == pytest.approx(float(module.dequantize().abs().max()))
        if found.tables is not None:
            assert 0 <= found.tables.entropy <= math.log2(found.tables.entries) + 1e-9
        module.snap()
    assert found.half.rounding == 0.0


def test_a_weight_that_is_not_finite_is_seen() -> None:
    module = QuantLinear.quantize(nn.Linear(16, 8, bias=False), {"scheme": "lut", "bits": 2}, keep_latent=False)
    with torch.no_grad():
        module.lut[0, 0] = float("inf")
    found = numbers_of(module)
    assert not found.finite and math.isfinite(found.largest)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


@given(st.lists(st.floats(width=32), min_size=1, max_size=9), st.integers(1, 4))
def test_the_largest_is_that_of_what_is_finite(values: list[float], piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "PIECE", piece)
        found = numbers.largest_of(torch.tensor(values))
    finite = [abs(value) for value in values if math.isfinite(value)]
    assert found == (max(finite, default=0.0), len(finite) == len(values))


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_windows_predict_every_token_once_with_enough_before_it(count: int, window: int, data) -> None:
    stride = data.draw(st.integers(1, window - 1))
    predicted: list[int] = []
    for item in windows(count, window, stride):
        assert item.stop - item.start <= window and item.start < item.first <= item.stop
        predicted += range(item.first, item.stop)
        assert all(target - item.start >= min(target, window - stride) for target in range(item.first, item.stop))
    assert predicted == list(range(1, count))
