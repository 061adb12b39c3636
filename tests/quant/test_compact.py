"""Compact modules compute what the quantized ones do, whatever the scheme, in one or two bytes a weight."""

import pytest
import torch
from torch import nn

from a1q.quant import compact
from a1q.quant.byte_tables import byte_tables
from a1q.quant.compact import TOLERANCE, CompactEmbedding, CompactLinear, compact_weight, held_bytes, weight_of_rows
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.linear import QuantLinear
from a1q.quant.planes import fbgemm_works
from tests.quant.test_schemes import SPECS, over

each = over(SPECS)
BYTES = {"affine": 1, "balanced": 1}
FAST = [True, False] if fbgemm_works() else [False]


def quantized(spec: dict, snapped: bool, rows: int = 36, columns: int = 48, **options) -> QuantLinear:
    torch.manual_seed(3)
    dense = nn.Linear(columns, rows)
    dense.weight.data *= torch.rand(rows, 1) + 0.5
    module = QuantLinear.quantize(dense, spec, **options)
    if snapped:
        module.snap()
    return module


def missed(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@each
@pytest.mark.parametrize("snapped", [False, True])
def test_every_scheme_computes_what_float64_does(spec: dict, snapped: bool) -> None:
    module = quantized(spec, snapped, keep_latent=False)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    wanted = x.double() @ module.dequantize().double().T + module.bias.double()
    form = module.scheme.table_form(module.parts())
    for fast in FAST:
        made = CompactLinear.of(module, fast)
        assert made.held.shape == (36, 48)
        error = missed(made(x), wanted)
        assert error < (2e-3 if made.held.bytes_each == 1 else 4e-5)
        if spec["scheme"] == "balanced" or (spec["scheme"] == "affine" and spec.get("granularity") != "group"):
            assert made.held.bytes_each == 1
            assert error < (4e-4 if spec["scheme"] == "balanced" and snapped else 2e-6)
        if form is None:
            assert made.held.bytes_each == 2
        elif len(form.tables) == 1:
            near = float(byte_tables(form.tables.detach()).error) <= TOLERANCE
            assert made.held.bytes_each == (1 if near else 2)


@each
def test_the_table_form_is_the_weight(spec: dict) -> None:
    for snapped in (False, True):
        module = quantized(spec, snapped, keep_latent=False)
        form = module.scheme.table_form(module.parts())
        if form is None:
            assert spec["granularity"] == "group"
            continue
        tables = form.tables.detach().double()
        if form.interleaved:
            tables = tables.repeat(36 // len(tables), 1)
        else:
            tables = tables.repeat_interleave(36 // len(tables), 0)
        entries = tables.gather(1, form.indices.long())
        if form.shift is not None:
            entries = entries + form.shift.double()[:, None]
        rows = torch.ones(36, 1).double() if form.rows is None else form.rows.detach().double()
        columns = torch.ones(rows.shape[1], 48).double() if form.columns is None else form.columns.detach().double()
        torch.testing.assert_close(entries * (rows @ columns), module.dequantize().double(), rtol=3e-6, atol=1e-8)


def test_latents_straight_through_fp16_and_adapters_count() -> None:
    module = quantized({"scheme": "lut_lowrank", "bits": 2, "lut": "symmetric"}, False)
    module.straight_through_fp16 = True
    assert module.latent is not None
    module.latent.data += 0.05 * torch.randn(36, 48)
    module.set_adapter(torch.randn(3, 48), torch.randn(36, 3), 6.0)
    x = torch.randn(4, 48)
    made = CompactLinear.of(module)
    with torch.no_grad():
        wanted = module(x)
    assert not made(x).requires_grad
    assert missed(made(x), wanted.double()) < 1e-3
    module.drop_adapter()
    assert missed(made(x), module(x).double()) > 0.1

    a, b = torch.randn(2, 48), torch.randn(36, 2)
    made.add_adapter(a, b, 0.5)
    more = 0.5 * (x.double() @ a.double().T) @ b.double().T
    assert missed(made(x), wanted.double() + more) < 1e-3
    with pytest.raises(ValueError, match="does not fit 36x48"):
        made.add_adapter(b, a)


def test_many_ranks_take_two_bytes_and_few_take_one() -> None:
    for rank, expected in ((1, 1), (4, 1), (5, 2)):
        spec = {"scheme": "lut_lowrank", "bits": 2, "rank": rank, "lut": "symmetric"}
        assert compact_weight(quantized(spec, True)).bytes_each == expected


@pytest.mark.parametrize("spec", [SPECS[0], {"scheme": "vector_lut", "bits": 1.5, "vector": 4}, SPECS[13], SPECS[22]])
def test_large_weights_come_in_blocks(spec: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    module = quantized(spec, True)
    whole = compact_weight(module)
    monkeypatch.setattr(compact, "ROWS", 8)
    monkeypatch.setattr(compact, "BLOCK", 48 * 5)
    parts = compact_weight(module)
    assert len(parts.planes._blocks) > 2 > len(whole.planes._blocks)
    x = torch.randn(3, 48)
    torch.testing.assert_close(parts.product(x), whole.product(x), rtol=1e-5, atol=1e-5)


def test_rows_that_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "BLOCK", 160)
    dense, asked = torch.randn(37, 16), []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return dense[start:stop].half()

    made = weight_of_rows(read, 37, 16, multiple=4)
    assert asked == [(start, min(start + 8, 37)) for start in range(0, 37, 8)]
    x = torch.randn(2, 16)
    assert missed(made.product(x), x.double() @ dense.half().double().T) < 2e-5


def test_schemes_that_say_no_rows_make_the_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = quantized(SPECS[22], True)
    wanted, made, scheme = module.dequantize(), [], type(module.scheme)
    dequantize = scheme.dequantize
    monkeypatch.setattr(scheme, "select_rows", lambda self, parts, rows: None)
    monkeypatch.setattr(scheme, "dequantize", lambda self, parts: made.append(1) or dequantize(self, parts))
    monkeypatch.setattr(compact, "BLOCK", 48 * 5)
    assert not compact.says_rows(module)
    found = compact_weight(module)
    assert len(made) == 1
    x = torch.randn(3, 48)
    assert missed(found.product(x), x.double() @ wanted.double().T) < 2e-5


@each
@pytest.mark.parametrize("snapped", [False, True])
@pytest.mark.parametrize("columns", [24, 7])
def test_embeddings_look_up_the_same_rows(spec: dict, snapped: bool, columns: int) -> None:
    if columns == 7 and (spec.get("granularity") == "group" or spec.get("rank", 1) > 1 or spec.get("factor_bits")):
        pytest.skip("does not fit such a shape")
    torch.manual_seed(0)
    module = QuantEmbedding.quantize(nn.Embedding(72, columns), spec, keep_latent=not snapped)
    if snapped:
        module.snap()
    ids = torch.tensor([[3, 71, 3], [0, 40, 41]])
    made = CompactEmbedding(module)
    with torch.no_grad():
        torch.testing.assert_close(made(ids), module(ids), rtol=1e-6, atol=1e-9)
    if 72 * columns * module.scheme.index_bits % (8 * 72) == 0:
        assert made.packed.numel() == 72 // module.scheme.vector * columns * module.scheme.index_bits // 8


def test_memory_is_counted_once() -> None:
    module = quantized(SPECS[16], True)  # balanced: no columns, no shift
    made = CompactLinear.of(module)
    per_row = made.held.planes.kind.PER_ROW
    assert held_bytes(made) == 36 * (48 + per_row) + 4 * 36
    assert held_bytes(nn.ModuleList([made, CompactLinear(made.held)])) == held_bytes(made)
