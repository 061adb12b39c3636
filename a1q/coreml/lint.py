"""Look through saved packages for what the Neural Engine is known to dislike (`rules`), without a Mac.

Findings of one rule and operation type in one function are one warning, with their number and an example. What the
engine really does with an operation only a Mac can say (`device.placements`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.coreml.accounting import find_duplicates
from a1q.coreml.costs import constant_origins
from a1q.coreml.rules import OFF_ENGINE, RULES, SEVERITIES, Severity
from a1q.coreml.spec import (
    Constant,
    Function,
    Operation,
    Tensor,
    WeightFile,
    numbers,
    read_functions,
    weight_file,
)
from a1q.coreml.toolkit import SPECIFICATION
from a1q.coreml.weightfile import read_spec
from a1q.engine.files import tree_size

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle

_PADDED_TO = 64
"""Bytes to which the last axis of a tensor is padded."""
_CHUNK = 1 << 22
"""Numbers looked at together, so that a large table is never copied whole."""


@dataclass(frozen=True)
class Finding:
    """What a rule found in one function of one part."""

    rule: str
    severity: Severity
    part: str
    function: str
    """Empty where it concerns the whole package."""
    operation_type: str
    operation: str
    """Name of an example: the largest where sizes are compared, else the first."""
    value: float | str
    """Of the example: what the rule compares."""
    unit: str
    count: int
    what: str
    source: str

    def __str__(self) -> str:
        place = " ".join(word for word in (self.part, self.function, self.operation_type, self.operation) if word)
        more = f", {self.count} in all" if self.count > 1 else ""
        value = (
            self.value if isinstance(self.value, str) else f"{self.value:,.4g}" if self.value < 1 else f"{self.value:,}"
        )
        return f"{self.severity}: {place}: {self.what} ({' '.join((value, self.unit)).strip()}{more}) [{self.source}]"


def digest(findings: Iterable[Finding]) -> list[str]:
    """One line per rule, the worst first: what it found, where, and who says so."""
    by_rule: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault((finding.severity, finding.rule), []).append(finding)
    lines = []
    for (severity, rule), found in sorted(by_rule.items(), key=lambda item: SEVERITIES.index(item[0][0])):
        types = ", ".join(dict.fromkeys(finding.operation_type for finding in found if finding.operation_type))
        places = ", ".join(dict.fromkeys(f"{finding.part} {finding.function}".strip() for finding in found))
        count = sum(finding.count for finding in found)
        what, source = RULES[rule].what, RULES[rule].source
        lines.append(f"{severity}: {rule}: {what} ({count}: {types or 'package'}; in {places}) [{source}]")
    return lines


class _Report:
    """Collects the findings of one part."""

    def __init__(self, part: str):
        self.part = part
        self.found: dict[tuple[str, str, str], Finding] = {}

    def add(
        self, rule: str, value: float | str, function: str = "", operation_type: str = "", operation: str = ""
    ) -> None:
        """Note a finding."""
        key, known = (rule, function, operation_type), RULES[rule]
        old = self.found.get(key)
        if old is not None and (isinstance(value, str) or isinstance(old.value, str) or value <= old.value):
            self.found[key] = replace(old, count=old.count + 1)
            return
        small = known.small is not None and not isinstance(value, str) and value <= known.small
        self.found[key] = Finding(
            rule=rule,
            severity="note" if small else known.severity,
            part=self.part,
            function=function,
            operation_type=operation_type,
            operation=operation,
            value=value,
            unit=known.unit,
            count=1 if old is None else old.count + 1,
            what=known.what,
            source=known.source,
        )

    def sorted(self) -> list[Finding]:
        """The worst first, otherwise as found."""
        return sorted(self.found.values(), key=lambda finding: SEVERITIES.index(finding.severity))


def lint_bundle(bundle: Bundle) -> list[Finding]:
    """Look through all parts of an exported folder."""
    found = [lint_package(bundle.folder / part["file"], part["name"]) for part in bundle.meta["parts"]]
    return sorted(
        (finding for part in found for finding in part), key=lambda finding: SEVERITIES.index(finding.severity)
    )


def lint_package(path: Path, part: str = "model") -> list[Finding]:
    """Look through one .mlpackage; the worst first.

    Raises:
        ValueError: if the package is damaged or truncated.
    """
    return lint_spec(read_spec(path), weight_file(path), tree_size(path), part)


def lint_spec(spec: Any, weights: WeightFile, package_bytes: int, part: str = "model") -> list[Finding]:
    """Look through a specification message (`Model`) and its weight file."""
    report = _Report(part)
    functions = read_functions(spec)
    _check_package(spec, functions, weights, package_bytes, report)
    seen: set[int] = set()
    for function in functions.values():
        _check_interface(function, _flexible_inputs(spec, function.name), report)
        _check_states(function, report)
        origins = constant_origins(function)
        for operation in function.operations:
            if operation.is_constant:
                _check_weight(function, operation, report)
            else:
                _check_operation(function, operation, report)
                _check_product(function, operation, origins.keys(), report)
            for constant in operation.constants.values():
                if constant.offset is None or constant.offset not in seen:
                    _check_numbers(function, operation, constant, weights, report)
            seen |= {c.offset for c in operation.constants.values() if c.offset is not None}
    return report.sorted()


# -- the package -----------------------------------------------------------------------------------------------------
def _check_package(
    spec: Any, functions: dict[str, Function], weights: WeightFile, package_bytes: int, report: _Report
) -> None:
    version = spec.specificationVersion
    needs_states = len(functions) > 1 or any(function.states for function in functions.values())
    if version < SPECIFICATION and needs_states:
        report.add("version-low", version)
    if version > SPECIFICATION:
        report.add("version-high", version)
    size_rule = next((rule for rule in ("huge-part", "large-part") if package_bytes > _limit(rule)), None)
    if size_rule:
        report.add(size_rule, package_bytes)
    for duplicate in find_duplicates(functions, weights):
        if duplicate.sharing_lost and duplicate.wasted_bytes >= _limit("stored-per-function"):
            report.add("stored-per-function", duplicate.wasted_bytes, operation=duplicate.names[0])


def _flexible_inputs(spec: Any, function: str) -> set[str]:
    """Inputs for which several shapes are enumerated."""
    descriptions = [item for item in spec.description.functions if item.name == function] or [spec.description]
    return {
        feature.name
        for feature in descriptions[0].input
        if feature.type.multiArrayType.WhichOneof("ShapeFlexibility") == "enumeratedShapes"
    }


# -- one function ----------------------------------------------------------------------------------------------------
def _check_interface(function: Function, enumerated: set[str], report: _Report) -> None:
    dynamic = [name for name, tensor in function.inputs.items() if None in tensor.shape]
    for name in dynamic:
        rule = "enumerated-shape" if name in enumerated else "dynamic-shape"
        report.add(rule, _shape(function.inputs[name]), function.name, "input", name)
    for operation in function.operations if not dynamic else ():
        for name, tensor in operation.outputs.items():
            if None in tensor.shape:
                report.add("dynamic-shape", _shape(tensor), function.name, operation.type, name)
    for name in function.outputs:
        if name in function.inputs or name in function.states:
            report.add("input-is-output", name, function.name, "output", name)


def _check_states(function: Function, report: _Report) -> None:
    for name, state in function.states.items():
        if any((size or 1) % int(_limit("state-size")) for size in state.shape[-2:]):
            report.add("state-size", _shape(state), function.name, "state", name)
        if state.dtype != "fp16":
            report.add("state-type", state.dtype, function.name, "state", name)
    for operation in function.operations:
        if operation.type == "write_state":
            wanted = function.values[operation.inputs["input"][0]]
            value = function.values[operation.inputs["data"][0]]
            if value.dtype != wanted.dtype:
                report.add("state-type", value.dtype, function.name, operation.type, operation.name)


def _check_operation(function: Function, operation: Operation, report: _Report) -> None:
    if operation.type in OFF_ENGINE:
        report.add(OFF_ENGINE[operation.type], operation.type, function.name, operation.type, operation.name)
    for name, tensor in operation.outputs.items():
        place = function.name, operation.type, name
        if len(tensor.shape) > _limit("rank"):
            report.add("rank", len(tensor.shape), *place)
        if max((size or 1 for size in tensor.shape), default=1) > _limit("dimension"):
            report.add("dimension", max(size or 1 for size in tensor.shape), *place)
        padded = _padded_bytes(tensor)
        if padded > tensor.bytes and padded >= _limit("narrow-axis") and operation.type not in OFF_ENGINE:
            report.add("narrow-axis", padded, *place)
        if tensor.dtype in ("int32", "fp32"):
            report.add(tensor.dtype, tensor.elements, *place)


def _check_product(function: Function, operation: Operation, constants: Iterable[str], report: _Report) -> None:
    place = function.name, operation.type, operation.name
    if operation.type == "conv":
        kernel = function.values[operation.inputs["weight"][0]].shape[2:]
        if set(kernel) != {1}:
            report.add("kernel", "x".join(map(str, kernel)), *place)
    operands = [name for key in ("x", "y", "weight") for name in operation.inputs.get(key, ())]
    if operation.type in ("linear", "matmul") and set(operands) & set(constants):
        report.add("projection", operation.type, *place)


def _check_weight(function: Function, operation: Operation, report: _Report) -> None:
    place = function.name, operation.type, operation.name
    if operation.type == "const" and operation.outputs[operation.name].dtype == "fp32":
        report.add("fp32-constant", operation.outputs[operation.name].elements, *place)
    if operation.type == "constexpr_blockwise_shift_scale":
        behind = [function.producers[name] for names in operation.inputs.values() for name in names]
        table = any(source.type == "constexpr_lut_to_dense" for source in behind)
        report.add("scale-behind-table" if table else "integer-weights", operation.type, *place)
    if operation.type == "constexpr_lut_to_dense":
        _check_tables(function, operation, report)


def _check_tables(function: Function, operation: Operation, report: _Report) -> None:
    """Tables [g1, ..., gk, 2**bits, d] of a weight [d1, ..., dk], d above 1 for vectors."""
    place = function.name, operation.type, operation.name
    table = _parameter(function, operation, "lut").shape
    weight = operation.outputs[operation.name].shape
    if len(table) != len(weight) + 2:
        return  # the form of iOS 16: one table
    if table[-1] != 1:
        along_outputs = _parameter(function, operation, "indices").shape[1:] == weight[1:]
        several = any(groups != 1 for groups in table[:-2])
        refused = not along_outputs or several or (table[-1] or 1) > 16 or (table[-2] or 1) * (table[-1] or 1) > 256
        report.add("vector-table" if refused else "vectors", f"{table[-2]} of {table[-1]}", *place)
    channels = (weight[0] or 1) // (table[0] or 1)
    if table[0] != 1 and channels < _limit("small-groups"):
        report.add("small-groups", channels, *place)
    if any(groups != 1 for groups in table[1:-2]):
        report.add("input-groups", table[1] or 1, *place)
    if function.states and table[-2] == 2 ** int(_limit("stateful-4-bit")):
        report.add("stateful-4-bit", "4 bits", *place)


def _check_numbers(
    function: Function, operation: Operation, constant: Constant, weights: WeightFile, report: _Report
) -> None:
    if constant.tensor.dtype != "fp16":
        return
    values = numbers(constant, weights)
    if values is None or not len(values):
        return
    bits = values.view(np.uint16)
    not_finite, subnormal = 0, 0
    for begin in range(0, len(bits), _CHUNK):
        magnitude = bits[begin : begin + _CHUNK] & 0x7FFF
        not_finite += int((magnitude >= 0x7C00).sum())
        subnormal += int(((magnitude > 0) & (magnitude < 0x0400)).sum())
    place = function.name, operation.type, operation.name
    if not_finite:
        report.add("not-finite", not_finite, *place)
    if subnormal / len(bits) >= _limit("subnormal"):
        report.add("subnormal", subnormal / len(bits), *place)


def _parameter(function: Function, operation: Operation, name: str) -> Tensor:
    """The type of a parameter, written at the operation or named."""
    if name in operation.constants:
        return operation.constants[name].tensor
    return function.values[operation.inputs[name][0]]


def _padded_bytes(tensor: Tensor) -> int:
    """Bytes of an fp16 tensor when its last axis is padded; 0 for other types."""
    if tensor.dtype != "fp16" or not tensor.shape:
        return 0
    last = tensor.shape[-1] or 1
    return tensor.elements // last * -(-2 * last // _PADDED_TO) * _PADDED_TO


def _limit(rule: str) -> float:
    threshold = RULES[rule].threshold
    assert threshold is not None
    return threshold


def _shape(tensor: Tensor) -> str:
    return "x".join("?" if size is None else str(size) for size in tensor.shape)
