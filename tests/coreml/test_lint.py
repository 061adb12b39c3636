from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from a1q.coreml import lint, rules
from a1q.coreml.lint import digest, lint_bundle, lint_package, lint_spec
from a1q.coreml.rules import FIELD, RULES, SEVERITIES
from a1q.coreml.spec import weight_file
from a1q.coreml.weightfile import read_spec
from tests.coreml.programs import const, write_program

X = {"x": ((1, 64, 1, 32), "fp16")}
rng = np.random.default_rng(0)


def half(*shape):
    return rng.standard_normal(shape).astype(np.float16)


def builder():
    from coremltools.converters.mil import Builder as mb

    return mb


def conv(x, weight=None):
    return builder().conv(x=x, weight=const("weight", half(32, 64, 1, 1) if weight is None else weight))


def found(path):
    """rule -> finding."""
    return {finding.rule: finding for finding in lint_package(path)}


def write(folder, build, inputs=X, states=None):
    functions = build if isinstance(build, dict) else {"main": build}
    return write_program(folder, functions, inputs, states)


def palettized(tables, entries=16, kind="uint4", shape=(32, 64, 1, 1)):
    from coremltools.converters.mil.mil import types

    bits = types.nptype_from_builtin(types.string_to_builtin(kind))
    codes = rng.integers(0, entries, shape).astype(np.uint8).view(bits)
    return builder().constexpr_lut_to_dense(
        indices=const("codes", codes), lut=const("lut", half(*tables, 1, 1, entries, 1))
    )


def vectors(entries=16, size=2, axis=0, tables=1, kind="uint4"):
    """Pairs, or vectors of another size, along an axis of the weight [32, 64, 1, 1]."""
    from coremltools.converters.mil.mil import types

    bits = types.nptype_from_builtin(types.string_to_builtin(kind))
    shape = [32, 64, 1, 1]
    shape[axis] //= size
    codes = rng.integers(0, entries, shape).astype(np.uint8).view(bits)
    lut = const("lut", half(tables, 1, 1, 1, entries, size))
    return builder().constexpr_lut_to_dense(indices=const("codes", codes), lut=lut, vector_axis=axis)


def remember(x, cache):
    mb = builder()
    return mb.coreml_update_state(state=cache, value=mb.add(x=mb.read_state(input=cache), y=x))


def scaled_table(x):
    table = palettized((1, 1))
    weight = builder().constexpr_blockwise_shift_scale(data=table, scale=const("scale", half(32, 1, 1, 1)))
    return conv_with(x, weight)


def conv_with(x, weight):
    return builder().conv(x=x, weight=weight)


def integers(x):
    data = const("data", rng.integers(-128, 127, (32, 64, 1, 1)).astype(np.int8))
    scale = const("scale", half(32, 1, 1, 1))
    return conv_with(x, builder().constexpr_blockwise_shift_scale(data=data, scale=scale))


CACHE = {"cache": ((1, 64, 32, 32), "fp16")}
NARROW_CACHE = {"cache": ((1, 64, 32, 30), "fp16")}


def with_nan():
    weight = half(32, 64, 1, 1)
    weight[3, 4] = np.nan
    return weight


def with_small(share):
    weight = 1 + np.abs(half(32, 64, 1, 1))
    weight.reshape(-1)[: int(weight.size * share)] = 1e-6
    return weight


def add_one(value):
    return lambda x: builder().add(x=x, y=value)


IDS = {"x": ((1, 4), "int32")}
WIDE = {"x": ((1, 4096, 1, 32), "fp16")}

# rule -> a program that breaks it and a similar one that does not: (build, inputs, states)
CASES = {
    "rank": (
        (lambda x: builder().reshape(x=x, shape=[1, 4, 2, 8, 1, 32]), X, None),
        (lambda x: builder().reshape(x=x, shape=[1, 4, 16, 1, 32]), X, None),
    ),
    "dimension": (
        (lambda x: conv(x, half(16416, 64, 1, 1)), X, None),
        (lambda x: conv(x, half(16384, 64, 1, 1)), X, None),
    ),
    "narrow-axis": (
        (lambda x: builder().transpose(x=x, perm=[0, 3, 1, 2]), {"x": ((1, 1024, 1, 32), "fp16")}, None),
        (lambda x: builder().transpose(x=x, perm=[0, 3, 1, 2]), {"x": ((1, 64, 1, 32), "fp16")}, None),
    ),
    "operation": (
        (lambda x: builder().gather(x=const("t", half(16, 32)), indices=x, axis=0, validate_indices=False), IDS, None),
        (lambda x: builder().slice_by_size(x=x, begin=[0, 0], size=[1, 2]), IDS, None),
    ),
    "int32": ((add_one(np.int32(1)), IDS, None), (add_one(np.float16(1)), X, None)),
    "fp32": (
        (lambda x: builder().cast(x=builder().cast(x=x, dtype="fp32"), dtype="fp16"), X, None),
        (lambda x: builder().exp(x=x), X, None),
    ),
    "fp32-constant": (
        (lambda x: builder().add(x=builder().cast(x=x, dtype="fp32"), y=np.float32(1)), X, None),
        (lambda x: builder().add(x=x, y=np.float16(1)), X, None),
    ),
    "not-finite": ((lambda x: conv(x, with_nan()), X, None), (lambda x: conv(x), X, None)),
    "subnormal": ((lambda x: conv(x, with_small(0.02)), X, None), (lambda x: conv(x, with_small(0.005)), X, None)),
    "state-size": ((remember, {"x": ((1, 64, 1, 30), "fp16")}, NARROW_CACHE), (remember, X, CACHE)),
    "vectors": ((lambda x: conv_with(x, vectors()), X, None), (lambda x: conv_with(x, palettized((1, 1))), X, None)),
    "vector-table": (
        (lambda x: conv_with(x, vectors(axis=1)), X, None),
        (lambda x: conv_with(x, vectors(64, 4, kind="uint6")), X, None),
    ),
    "stateful-4-bit": (
        (lambda x, cache: conv_with(remember(x, cache), palettized((1, 1))), X, CACHE),
        (lambda x: conv_with(x, palettized((1, 1))), X, None),
    ),
    "small-groups": (
        (lambda x: conv_with(x, palettized((8, 1))), X, None),
        (lambda x: conv_with(x, palettized((4, 1))), X, None),
    ),
    "input-groups": (
        (lambda x: conv_with(x, palettized((1, 8))), X, None),
        (lambda x: conv_with(x, palettized((2, 1))), X, None),
    ),
    "scale-behind-table": ((scaled_table, X, None), (integers, X, None)),
    "integer-weights": ((integers, X, None), (lambda x: conv_with(x, palettized((1, 1))), X, None)),
    "kernel": ((lambda x: conv(x, half(32, 64, 1, 3)), X, None), (lambda x: conv(x), X, None)),
    "projection": (
        (lambda x: builder().matmul(x=x, y=const("w", half(32, 32))), X, None),
        (lambda x: builder().matmul(x=x, y=x, transpose_y=True), X, None),
    ),
    "stored-per-function": (
        ({name: lambda x: builder().conv(x=x, weight=const("w", ONE, False)) for name in ("a", "b")}, X, None),
        ({name: lambda x: builder().conv(x=x, weight=const("w", ONE)) for name in ("a", "b")}, X, None),
    ),
    "recurrent": (
        (
            lambda x: builder().gru(
                x=x, initial_h=half(1, 8), weight_ih=half(24, 16), weight_hh=half(24, 8), reset_after=False
            )[0],
            {"x": ((4, 1, 16), "fp16")},
            None,
        ),
        (lambda x: builder().tanh(x=x), {"x": ((4, 1, 16), "fp16")}, None),
    ),
}
ONE = half(64, 64, 1, 1)
EDITED = {
    "dynamic-shape", "enumerated-shape", "state-type", "input-is-output", "large-part", "huge-part", "version-low",
    "version-high",
}  # fmt: skip
"""What coremltools itself would not write, or not so small."""


def test_every_rule_is_tested():
    assert CASES.keys() | EDITED == RULES.keys()


@pytest.mark.parametrize("rule", sorted(CASES))
def test_rule(rule, tmp_path):
    for name, (build, inputs, states) in zip(("bad", "good"), CASES[rule], strict=True):
        (tmp_path / name).mkdir()
        findings = found(write(tmp_path / name, build, inputs, states))
        assert (rule in findings) == (name == "bad"), findings
        if rule in findings:
            assert findings[rule].source == RULES[rule].source
            assert findings[rule].what in str(findings[rule])


@pytest.fixture
def edited(tmp_path):
    """edited(edit, build=..., ...) -> rule -> finding, after `edit(spec)`."""

    def run(edit, build=conv, inputs=X, states=None, package_bytes=1000):
        path = tmp_path / "program.mlpackage"
        if not path.exists():
            write(tmp_path, build, inputs, states)
        spec = read_spec(path)
        edit(spec)
        return {f.rule: f for f in lint_spec(spec, weight_file(path), package_bytes)}

    return run


def block(spec):
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def nothing(spec):
    pass


def test_shapes_that_are_not_static(edited):
    def dynamic(spec):
        for item in [spec.mlProgram.functions["main"].inputs[0], block(spec).operations[-1].outputs[0]]:
            dimension = item.type.tensorType.dimensions[3]
            dimension.ClearField("constant")
            dimension.unknown.variadic = False

    def enumerated(spec):
        dynamic(spec)
        shapes = spec.description.input[0].type.multiArrayType.enumeratedShapes.shapes
        for last in (1, 64):
            shapes.add().shape.extend([1, 64, 1, last])

    def inside(spec):
        dynamic(spec)
        spec.mlProgram.functions["main"].inputs[0].type.tensorType.dimensions[3].constant.size = 32

    assert not edited(nothing).keys() & {"dynamic-shape", "enumerated-shape"}
    found = edited(dynamic)
    assert found["dynamic-shape"].operation == "x"
    assert found["dynamic-shape"].value == "1x64x1x?"
    assert "enumerated-shape" not in found
    found = edited(enumerated)
    assert "dynamic-shape" not in found
    assert found["enumerated-shape"].severity == "note"
    assert edited(inside)["dynamic-shape"].operation_type == "conv"


def test_state_and_update_have_one_type(edited):
    def update(spec):
        data = next(op for op in block(spec).operations if op.type == "write_state").inputs["data"].arguments[0].name
        for operation in block(spec).operations:
            for output in operation.outputs:
                if output.name == data:
                    output.type.tensorType.dataType = 11

    assert "state-type" not in edited(nothing, remember, X, CACHE)
    finding = edited(update, remember, X, CACHE)["state-type"]
    assert (finding.severity, finding.operation_type, finding.value) == ("error", "write_state", "fp32")


def test_state_in_fp32(edited):
    def state(spec):
        for item in spec.mlProgram.functions["main"].inputs:
            if item.name == "cache":
                item.type.stateType.wrappedType.tensorType.dataType = 11
        for operation in block(spec).operations:
            for output in operation.outputs:
                if output.type.tensorType.dataType == 10:
                    output.type.tensorType.dataType = 11

    finding = edited(state, remember, X, CACHE)["state-type"]
    assert (finding.operation_type, finding.operation, finding.value) == ("state", "cache", "fp32")


def test_input_that_is_output(edited):
    def alias(spec):
        block(spec).outputs[0] = "x"

    assert "input-is-output" not in edited(nothing)
    assert edited(alias)["input-is-output"].value == "x"


@pytest.mark.parametrize(
    ("size", "rule"), [(249_000_000, None), (251_000_000, "large-part"), (951_000_000, "huge-part")]
)
def test_size_of_a_part(edited, size, rule):
    assert edited(nothing, package_bytes=size).keys() & {"large-part", "huge-part"} == ({rule} if rule else set())


@pytest.mark.parametrize(
    ("version", "states", "rule"),
    [(8, True, "version-low"), (8, False, None), (9, True, None), (10, False, "version-high")],
)
def test_specification_version(edited, version, states, rule):
    def change(spec):
        spec.specificationVersion = version

    arguments = (remember, X, CACHE) if states else ()
    assert edited(change, *arguments).keys() & {"version-low", "version-high"} == ({rule} if rule else set())


@pytest.mark.parametrize(
    "options",
    [
        {"axis": 1},
        {"tables": 4},
        {"entries": 64, "size": 8, "kind": "uint6"},
        {"entries": 4, "size": 32, "kind": "uint2"},
    ],
    ids=["inputs", "tables", "numbers", "size"],
)
def test_vectors_that_are_refused(options, tmp_path):
    findings = found(write(tmp_path, lambda x: conv_with(x, vectors(**options))))
    assert "vector-table" in findings
    assert "vectors" not in findings


def test_findings_are_aggregated_with_the_largest_as_example(tmp_path):
    mb = builder()

    def build(x):
        small = mb.add(x=x, y=np.int32(1), name="small")
        large = mb.add(x=mb.concat(values=[small, small], axis=1), y=np.int32(2), name="large")
        return [large, mb.add(x=small, y=np.int32(3))]

    findings = lint_package(write(tmp_path, build, IDS))
    finding = next(f for f in findings if (f.rule, f.operation_type) == ("int32", "add"))
    assert (finding.count, finding.operation, finding.value) == (3, "large", 8)
    assert finding.function == "main"


def test_small_is_a_note_and_large_a_warning(tmp_path):
    for size, severity in ((4, "note"), (70_000, "warning")):
        folder = tmp_path / severity
        folder.mkdir()
        path = write(folder, add_one(np.int32(1)), {"x": ((1, size), "int32")})
        assert found(path)["int32"].severity == severity


def test_own_packages_have_only_expected_findings(form):
    """The token's row, positions and rotary angles; one epsilon; tables and states where the scheme says so."""
    expected = {"operation", "int32", "fp32", "fp32-constant", "subnormal"}
    for name, more in (
        ("dense", set()),
        ("group-4", {"stateful-4-bit"}),
        ("channel-3", {"small-groups"}),
        ("rank-3", set()),
        ("pairs", {"stateful-4-bit", "vectors"}),
    ):
        findings = lint_package(form(name, False)[1].path)
        assert {finding.rule for finding in findings} == expected | more
        assert {finding.severity for finding in findings} == {"note"}
        epsilons = [f for f in findings if f.rule == "subnormal"]
        assert all("epsilon" in f.operation for f in epsilons)
        assert {f.operation_type for f in findings if f.rule == "fp32"} == {"cast", "cos", "mul", "sin"}
        assert all(json.dumps(asdict(finding)) for finding in findings)


def test_digest_has_a_line_per_rule(form):
    findings = lint_package(form("rank-3", False)[1].path)
    lines = digest(findings)
    assert len(lines) == len({finding.rule for finding in findings}) < len(findings)
    line = next(line for line in lines if "fp32: " in line)
    assert line.startswith("note: fp32: fp32 tensor")
    assert "(8: cast, mul, cos, sin; in model infer, model prefill)" in line


def test_a_bundle_names_the_part_of_every_finding(form):
    path = form("dense", False)[1].path
    parts = [{"name": name, "file": path.name} for name in ("one", "two")]
    findings = lint_bundle(SimpleNamespace(folder=path.parent, meta={"parts": parts}))
    assert [finding.part for finding in findings].count("one") == len(findings) // 2 == len(lint_package(path))


def test_worst_first(tmp_path):
    mb = builder()

    def build(x):
        return [conv(x, with_nan()), mb.reshape(x=x, shape=[1, 4, 2, 8, 1, 32])]

    severities = [SEVERITIES.index(finding.severity) for finding in lint_package(write(tmp_path, build))]
    assert severities == sorted(severities)
    assert severities[0] == 0


def test_sources_are_pages_or_field_reports():
    for rule in RULES.values():
        assert rule.source == FIELD or all(part.startswith("https://") for part in rule.source.split(", "))
        assert rule.severity in SEVERITIES
    assert set(rules.OFF_ENGINE.values()) <= RULES.keys()


def test_large_constants_are_looked_at_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(lint, "_CHUNK", 100)
    weight = half(32, 64, 1, 1)
    weight[31, 63] = np.inf
    assert found(write(tmp_path, lambda x: conv(x, weight)))["not-finite"].value == 1
