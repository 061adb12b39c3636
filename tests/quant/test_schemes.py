"""What every scheme promises, and what each adds."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.engine.registry import load_registry
from a1q.errors import StageError
from a1q.quant.build import complete, make_scheme
from a1q.quant.importance import Inputs
from a1q.quant.scheme import Blockwise, Palettized
from tests.quant.properties import said_by_hardware, squares

SPECS = [
    {"scheme": "lut_lowrank", "bits": 2},
    {"scheme": "lut_lowrank", "bits": 4, "rank": 3, "lut": "fixed"},
    {"scheme": "lut_lowrank", "bits": 3, "rank": 2, "fit": "absmax_svd", "group_size": 8},
    {"scheme": "lut_lowrank", "bits": 1, "rounds": 3},
    {"scheme": "lut_lowrank", "bits": 1, "lut": "symmetric"},
    {"scheme": "lut_lowrank", "bits": 3, "rank": 2, "lut": "symmetric"},
    {"scheme": "lut_lowrank", "bits": 8, "lut": "symmetric", "fit": "absmax_svd"},
    {"scheme": "lut_lowrank", "bits": 2, "rank": 2, "factor_bits": 4},
    {"scheme": "lut_lowrank", "bits": 4, "factor_bits": 4, "fit": "absmax_svd", "group_size": 8},
    {"scheme": "vector_lut", "bits": 2},
    {"scheme": "vector_lut", "bits": 3, "rank": 2, "fit": "kmeans"},
    {"scheme": "vector_lut", "bits": 1.5, "vector": 4},
    {"scheme": "lut", "bits": 2},
    {"scheme": "lut", "bits": 6, "granularity": "channel"},
    {"scheme": "lut", "bits": 3, "granularity": "group", "channels": 4},
    {"scheme": "lut", "bits": 8},
    {"scheme": "balanced", "bits": 2},
    {"scheme": "balanced", "bits": 4, "granularity": "channel"},
    {"scheme": "balanced", "bits": 1, "fit": "percentile"},
    {"scheme": "balanced", "bits": 8},
    {"scheme": "affine", "bits": 4},
    {"scheme": "affine", "bits": 2, "symmetric": False},
    {"scheme": "affine", "bits": 3, "granularity": "group", "group_size": 8},
    {"scheme": "affine", "bits": 8, "symmetric": False, "granularity": "group", "group_size": 8, "fit": "minmax"},
]


def over(specs):
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: "-".join(map(str, spec.values())))


each = over(SPECS)
each_weighted = over(
    [spec for spec in SPECS if spec.get("fit") != "absmax_svd"]
)  # the published start knows no weights


def random_weight(seed: int = 0, rows: int = 12, columns: int = 24) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@each
def test_parts_indices_and_weight_agree(spec) -> None:
    scheme, weight = make_scheme(spec), random_weight()
    parts = scheme.fit(weight, None, 0)
    assert {name: tuple(part.shape) for name, part in parts.items() if name != "indices"} == scheme.part_shapes(
        (12, 24)
    )
    assert parts["indices"].dtype == torch.uint8
    assert parts["indices"].shape == (12 // scheme.vector, 24)
    assert int(parts["indices"].max()) < 2**scheme.index_bits
    exact = scheme.dequantize(parts)
    assert exact.dtype == torch.float32
    assert torch.equal(scheme.weight(parts, None, False), exact)
    assert torch.equal(scheme.weight(parts, weight, False), exact)
    assert torch.equal(scheme.assign(parts, weight), parts["indices"])
    assert float((weight - exact).square().sum()) < float(weight.square().sum())


@each
def test_assignment_is_the_nearest_point_of_the_grid(spec) -> None:
    scheme = make_scheme(spec)
    parts = {
        name: part.double() if name != "indices" else part
        for name, part in scheme.fit(random_weight(), None, 0).items()
    }
    weight = random_weight(1).double() * parts.get("gain", torch.ones(12))[:, None]
    assigned = scheme.dequantize({**parts, "indices": scheme.assign(parts, random_weight(1).double())})
    every = [
        scheme.dequantize({**parts, "indices": torch.full_like(parts["indices"], index)})
        for index in range(2**scheme.index_bits)
    ]
    best = squares(weight - torch.stack(every), scheme.vector).amin(0)
    torch.testing.assert_close(squares(weight - assigned, scheme.vector), best, rtol=1e-9, atol=1e-15)


@each
def test_snapped_parts_are_what_the_bits_count(spec) -> None:
    scheme, weight = make_scheme(spec), random_weight()
    parts = scheme.fit(weight, None, 0)
    snapped = scheme.snap(parts)
    shapes = {name: tuple(part.shape) for name, part in snapped.items() if name != "indices"}
    assert shapes == scheme.part_shapes((12, 24), snapped=True)
    for name, part in snapped.items():
        assert part.dtype == (torch.uint8 if name in scheme.integers else torch.float16)
    assert all(int(snapped[name].max()) < 2 ** scheme.width(name) for name in scheme.integers)
    widths = {name: scheme.width(name) if name in scheme.integers else 16 for name in snapped}
    assert scheme.bits((12, 24)) == sum(widths[name] * part.numel() for name, part in snapped.items())
    exact = scheme.dequantize(parts)
    largest = float(exact.abs().max())
    torch.testing.assert_close(scheme.dequantize(snapped), exact, rtol=4e-3, atol=4e-3 * largest)
    again = scheme.snap(snapped)
    assert all(torch.equal(again[name], part) for name, part in snapped.items())


@each
def test_the_hardware_form_is_the_snapped_weight_bit_for_bit(spec) -> None:
    scheme = make_scheme(spec)
    snapped = scheme.snap(scheme.fit(random_weight(), None, 0))
    if not scheme.hardware:
        with pytest.raises(NotImplementedError, match="no hardware form"):
            scheme.hardware_form(snapped)
        return
    form = scheme.hardware_form(snapped)
    assert torch.equal(said_by_hardware(form), scheme.dequantize(snapped))
    kind = {"palette": Palettized, "blockwise": Blockwise}[scheme.hardware]
    assert isinstance(form, kind)


@each
def test_training_with_fp16_sees_what_snap_stores(spec) -> None:
    scheme, weight = make_scheme(spec), random_weight()
    parts = scheme.fit(weight, None, 0)
    assert torch.equal(scheme.weight(parts, None, True), scheme.dequantize(scheme.snap(parts)))


@each
@pytest.mark.parametrize("fp16", [False, True])
def test_rows_by_themselves_are_those_of_the_whole_weight(spec, fp16) -> None:
    scheme, latent = make_scheme(spec), random_weight(1)
    parts = scheme.fit(random_weight(), None, 0)
    trained = [name for names in scheme.trainable.values() for name in names]
    for name in trained:
        parts[name].requires_grad_()
    picked = torch.tensor([7, 0, 7, 11]) if scheme.vector == 1 else torch.tensor([2, 0, 2])
    rows = (picked[:, None] * scheme.vector + torch.arange(scheme.vector)).flatten()
    selected = scheme.select_rows(parts, rows)
    assert selected is not None
    some = scheme.weight(selected, latent[rows], fp16)
    whole = scheme.weight(parts, latent, fp16)[rows]
    torch.testing.assert_close(some, whole, rtol=1e-6, atol=1e-8)
    wanted = [parts[name] for name in dict.fromkeys(trained)]
    upstream = random_weight(2, len(rows))
    if wanted:
        torch.testing.assert_close(
            torch.autograd.grad(some, wanted, upstream), torch.autograd.grad(whole, wanted, upstream)
        )


@each
def test_forms_are_one_function(spec) -> None:
    scheme = make_scheme(spec)
    parts = {
        name: part.double() if name != "indices" else part
        for name, part in scheme.fit(random_weight(), None, 0).items()
    }
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = x @ scheme.dequantize(parts).T
    for form in ("dense", "factored", "batched"):
        torch.testing.assert_close(scheme.apply(parts, x, form), expected, rtol=1e-11, atol=1e-12)


@each
def test_same_seed_same_bits(spec) -> None:
    scheme, weight = make_scheme(spec), random_weight()
    first, second = (scheme.fit(weight.clone(), Inputs(torch.arange(24.0)), 7) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_weighted
def test_statistics_move_the_error_to_channels_that_matter_less(spec) -> None:
    scheme, weight = make_scheme(spec), random_weight(3, 16, 64)
    statistics = torch.ones(64)
    statistics[:8] = 1000
    plain = scheme.dequantize(scheme.fit(weight, None, 0))
    aware = scheme.dequantize(scheme.fit(weight, Inputs(statistics), 0))
    assert weighted(weight - aware, statistics) <= weighted(weight - plain, statistics)


def weighted(difference: torch.Tensor, statistics: torch.Tensor) -> float:
    return float((difference.square() * statistics).sum())


@over([*SPECS[:2], SPECS[7], SPECS[9], SPECS[11]])  # a scale or a table serves several rows, and no index does
def test_errors_move_to_rows_that_matter_less(spec) -> None:
    scheme, weight = make_scheme(spec), random_weight(4, 64, 24)
    weight[::8] *= 0.3
    rows = torch.ones(64)
    rows[::8] = 1000
    inputs = Inputs(torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.1, rows=rows)
    plain, aware = (
        (weight - scheme.dequantize(scheme.fit(weight, given, 0))).square() @ inputs.square
        for given in (Inputs(inputs.square), inputs)
    )
    assert aware[::8].sum() < 0.95 * plain[::8].sum()


@each_weighted
def test_bad_statistics_are_refused(spec) -> None:
    for bad in (torch.ones(23), torch.full((24,), torch.nan), -torch.ones(24)):
        with pytest.raises(ValueError, match="24 finite values"):
            make_scheme(spec).fit(random_weight(), Inputs(bad), 0)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 6, 8]),
    rank=st.integers(1, 40),
    rows=st.integers(1, 4096),
    columns=st.integers(1, 4096),
)
def test_bits_of_the_low_rank_form(bits, rank, rows, columns) -> None:
    scheme = make_scheme({"scheme": "lut_lowrank", "bits": bits, "rank": rank})
    assert bool(scheme.check((rows, columns))) == (rank > min(rows, columns))
    overhead = scheme.bits((rows, columns)) - bits * rows * columns
    assert overhead == 16 * (2**bits + rank * rows + rank * columns)


def test_a_group_must_divide_the_channels() -> None:
    scheme = make_scheme({"scheme": "lut", "bits": 2, "granularity": "group", "channels": 5})
    assert scheme.check((12, 24)) == ["12 output channels are no multiple of `channels: 5`"]
    assert scheme.check((10, 24)) == []


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 1.5, 2, 3]),
    vector=st.sampled_from([2, 4]),
    rank=st.integers(1, 4),
    rows=st.integers(1, 4096),
    columns=st.integers(4, 4096),
)
def test_bits_of_vectors(bits, vector, rank, rows, columns) -> None:
    scheme = make_scheme({"scheme": "vector_lut", "bits": bits, "vector": vector, "rank": rank})
    entries = 2 ** round(bits * vector)
    problems = " ".join(scheme.check((rows, columns)))
    assert ("than the 256 numbers" in problems) == (entries * vector > 256)
    assert ("no multiple of `vector" in problems) == bool(rows % vector)
    if not rows % vector:
        assert scheme.bits((rows, columns)) == bits * rows * columns + 16 * (entries * vector + rank * (rows + columns))


def test_a_fixed_table_does_not_train() -> None:
    assert "lut" not in make_scheme({"scheme": "lut_lowrank", "bits": 2, "lut": "fixed"}).trainable
    assert make_scheme({"scheme": "lut_lowrank", "bits": 2}).trainable["lut"] == ("lut",)


def test_unknown_names_are_told() -> None:
    with pytest.raises(StageError, match="did you mean 'lut_lowrank'"):
        make_scheme({"scheme": "lut_lowrnk", "bits": 2})
    with pytest.raises(StageError, match="unknown option rnk"):
        make_scheme({"scheme": "lut_lowrank", "bits": 2, "rnk": 3})
    with pytest.raises(StageError, match="`bits: 5` is none of 1, 2, 3, 4, 6, 8"):
        make_scheme({"scheme": "lut", "bits": 5})
    with pytest.raises(StageError, match="`bits: True` is none of"):
        make_scheme({"scheme": "lut", "bits": True})
    with pytest.raises(StageError, match="missing option bits"):
        make_scheme({"scheme": "lut"})


def test_defaults_come_from_the_schema() -> None:
    properties = load_registry().schema("schemes", "lut_lowrank")["properties"]
    filled = complete({"scheme": "lut_lowrank", "bits": 2})
    assert filled == {"scheme": "lut_lowrank", "bits": 2} | {
        name: rule["default"] for name, rule in properties.items() if "default" in rule
    }


@pytest.mark.parametrize("scheme", ["lut", "vector_lut"])
def test_two_is_two_however_it_is_written(scheme) -> None:
    assert repr(complete({"scheme": scheme, "bits": 2.0})["bits"]) == "2"


def test_making_schemes_and_counting_bits_imports_no_torch() -> None:
    code = (
        "import sys, json; from a1q.quant.build import make_scheme;"
        f"[make_scheme(spec).bits((64, 64)) for spec in json.loads('{json.dumps(SPECS)}')];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
