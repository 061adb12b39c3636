"""`fit: error_feedback` in every scheme that has it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a1q.errors import StageError
from a1q.quant.build import complete, make_scheme
from a1q.quant.importance import Inputs
from a1q.quant.linear import QuantLinear
from a1q.quant.lowrank import START_STALL
from a1q.quant.module import naming

PLAIN = {"lut_lowrank": "als", "vector_lut": "kmeans", "lut": "kmeans", "balanced": "mse", "affine": "mse"}
SPECS = [
    {"scheme": "lut_lowrank"},
    {"scheme": "lut_lowrank", "rank": 2},
    {"scheme": "lut_lowrank", "rank": 2, "lut": "fixed"},
    {"scheme": "vector_lut"},
    {"scheme": "vector_lut", "vector": 4, "rank": 2},
    {"scheme": "lut"},
    {"scheme": "lut", "granularity": "group", "channels": 4},
    {"scheme": "lut", "granularity": "channel"},
    {"scheme": "balanced"},
    {"scheme": "balanced", "granularity": "channel"},
    {"scheme": "affine"},
    {"scheme": "affine", "symmetric": False},
    {"scheme": "affine", "granularity": "group", "group_size": 8},
    {"scheme": "affine", "symmetric": False, "granularity": "group", "group_size": 8},
]
each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))


def at(spec, bits: int):
    """The scheme with so many bits, or with the nearest number that it knows."""
    if spec["scheme"] == "vector_lut":
        bits = min(bits, 1.5 if spec.get("vector") == 4 else 3)
    return {**spec, "bits": 2 if spec["scheme"] == "affine" and bits == 1 else bits}


def problem(seed: int, tokens: int = 200, rows: int = 12, columns: int = 24) -> tuple[torch.Tensor, Inputs]:
    """A weight, and correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = x.T @ x / tokens
    return 0.05 * torch.randn(rows, columns, generator=generator), Inputs(gram.diagonal().clone(), gram)


def error_of(spec, weight: torch.Tensor, inputs: Inputs, given: Inputs | None) -> float:
    scheme = make_scheme(spec)
    difference = (weight - scheme.dequantize(scheme.fit(weight, given, 0))).double()
    assert inputs.gram is not None
    return float(torch.einsum("ij,jk,ik->", difference, inputs.gram.double(), difference))


@each
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_the_default_and_much_better_than_the_plain_fit(spec, bits) -> None:
    weight, inputs = problem(0)
    spec = at(spec, bits)
    assert complete(spec)["fit"] == "error_feedback"
    plain = error_of({**spec, "fit": PLAIN[spec["scheme"]]}, weight, inputs, inputs)
    assert error_of(spec, weight, inputs, inputs) < 0.85 * plain


@each
def test_without_correlations_known_it_is_the_plain_fit(spec) -> None:
    weight, inputs = problem(1)
    for known in (None, Inputs(inputs.square)):
        fed, plain = (
            make_scheme({**at(spec, 2), "fit": fit}).fit(weight, known, 0)
            for fit in ("error_feedback", PLAIN[spec["scheme"]])
        )
        assert fed.keys() == plain.keys()
        assert all(torch.equal(part, plain[name]) for name, part in fed.items())


@each
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([1, 2, 3, 8]),
    tokens=st.sampled_from([1, 5, 100]),
    odd=st.sampled_from(["", "zero weight", "zero row", "zero column", "constant", "no input", "silent", "even"]),
)
def test_whatever_comes_it_is_finite_and_no_worse(spec, seed, bits, tokens, odd) -> None:
    spec = at(spec, bits)
    weight, inputs = problem(seed, tokens)
    assert inputs.gram is not None
    if odd == "zero weight":
        weight.zero_()
    elif odd == "zero row":
        weight[3] = 0
    elif odd == "zero column":
        weight[:, 5] = 0
    elif odd == "constant":
        weight[7] = 0.03
    elif odd == "no input":
        inputs = Inputs(torch.zeros(24), torch.zeros(24, 24))
    elif odd == "silent":
        inputs.gram[4], inputs.gram[:, 4] = 0, 0
        inputs = Inputs(inputs.gram.diagonal().clone(), inputs.gram)
    elif odd == "even":
        inputs = Inputs(torch.ones(24), torch.ones(24, 24))
    scheme = make_scheme(spec)
    parts, again = scheme.fit(weight, inputs, 0), scheme.fit(weight, inputs, 0)
    assert all(torch.equal(part, again[name]) for name, part in parts.items())
    assert {name: tuple(part.shape) for name, part in parts.items() if name != "indices"} == scheme.part_shapes(
        (12, 24)
    )
    assert parts["indices"].dtype == torch.uint8
    assert int(parts["indices"].max()) < 2**scheme.index_bits
    found = scheme.dequantize(parts)
    assert bool(torch.isfinite(found).all())
    assert torch.equal(scheme.weight(parts, None, True), scheme.dequantize(scheme.snap(parts)))
    plain_scheme = make_scheme({**spec, "fit": PLAIN[spec["scheme"]]})
    plain = plain_scheme.fit(weight, inputs, 0)
    if "gain" in plain:  # which widens rows beyond least squares
        plain["gain"], plain["a"] = torch.ones_like(plain["gain"]), plain["a"] / plain["gain"][:, None]
    assert inputs.gram is not None
    h = inputs.gram.double() + 0.01 * max(float(inputs.square.mean()), 1e-30) * torch.eye(24, dtype=torch.float64)
    errors = [
        float(torch.einsum("ij,jk,ik->", d, h, d))
        for d in ((weight - v).double() for v in (found, plain_scheme.dequantize(plain)))
    ]
    whole = float(torch.einsum("ij,jk,ik->", weight.double(), h, weight.double()))
    # a start ends its rounds earlier than the plain fit does, and is what the result is no worse than
    assert errors[0] <= errors[1] * (1 + 10 * START_STALL) + 1e-9 * whole


def test_a_rank_as_large_as_the_matrix() -> None:
    weight, inputs = problem(2)
    scheme = make_scheme({"scheme": "lut_lowrank", "bits": 2, "rank": 12})
    assert bool(torch.isfinite(scheme.dequantize(scheme.fit(weight, inputs, 0))).all())


@each
def test_bad_statistics_are_told_with_the_module(spec) -> None:
    weight, inputs = problem(3)
    assert inputs.gram is not None
    dense = torch.nn.Linear(24, 12, bias=False)
    dense.weight.data.copy_(weight)
    bad = inputs.gram.clone()
    bad[2, 3] = torch.nan
    for gram in (bad, inputs.gram[:5]):
        with pytest.raises(StageError, match=r"layers\.3\.up: E\[x x\^T\] must be 24x24 finite"), naming("layers.3.up"):
            QuantLinear.quantize(dense, at(spec, 2), Inputs(inputs.square, gram))


def test_rows_that_count_more_are_fitted_better() -> None:
    weight, inputs = problem(4, rows=64)
    rows = torch.ones(64)
    rows[::8] = 1000
    for spec in ({"scheme": "lut", "bits": 2}, {"scheme": "lut_lowrank", "bits": 2}, {"scheme": "balanced", "bits": 2}):
        weight_here = weight.clone()
        weight_here[::8] *= 0.4
        scheme = make_scheme(spec)
        errors = []
        for given_rows in (None, rows):
            found = scheme.dequantize(scheme.fit(weight_here, Inputs(inputs.square, inputs.gram, given_rows), 0))
            difference = (weight_here - found)[::8]
            errors.append(float(((difference @ inputs.gram) * difference).sum()))
        assert errors[1] < 0.95 * errors[0]
