"""What a package costs: operations, bytes by kind, bits per weight, bytes and multiply-adds per generated token.

Everything is counted in the saved files. A constant that several functions name at one offset of the weight file
counts once. What one function costs is counted in `costs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from a1q.coreml.costs import FunctionCosts, function_costs
from a1q.coreml.spec import Constant, Function, Operation, WeightFile, read_functions, weight_file
from a1q.coreml.weightfile import read_spec
from a1q.engine.files import tree_size

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle

TOKEN_FUNCTION = "infer"
"""The function that is called for every generated token; a part with one function needs no such name."""
KINDS = ("indices", "tables", "scales", "dense", "other")
_CONSTEXPR_KINDS = {
    "indices": "indices", "data": "indices", "quantized_data": "indices", "lut": "tables",
    "scale": "scales", "offset": "scales", "zero_point": "scales",
}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A constant of a part, counted once."""

    name: str
    kind: str
    """One of `KINDS`: palette indices and quantized integers; tables; scales and zero points, also those that stand as
    factors of their own; dense fp16 weights; anything else."""
    offset: int | None
    """None: written into the program, as tables of a few entries are."""
    bytes: int
    elements: int
    """Numbers in it."""


@dataclass(frozen=True)
class Duplicate:
    """The same bytes at several offsets of a weight file."""

    names: tuple[str, ...]
    """One name per copy."""
    functions: tuple[tuple[str, ...], ...]
    """The functions that use each copy."""
    wasted_bytes: int

    @property
    def sharing_lost(self) -> bool:
        """Whether two functions have a copy each, where one would do for both."""
        return any(set(a).isdisjoint(b) for a, b in combinations(self.functions, 2))


@dataclass(frozen=True)
class PartReport:
    """One package of an export."""

    name: str
    role: str
    functions: dict[str, FunctionCosts]
    bytes_on_disk: int
    weight_bytes: int
    """Size of the weight file."""
    bytes_by_kind: dict[str, int]
    """Bytes of the constants by `KINDS`, small tables written into the program included."""
    overhead_bytes: int
    """Of the weight file: headers and alignment."""
    quantized_weights: int
    """Weights that are palettized or integers."""
    dense_weights: int
    bits_per_weight: float | None
    """Of the quantized weights, with tables, scales and zero points; None if there are none."""
    theory_bytes: int | None
    size_ratio: float | None
    """Size of the weight file over `theory_bytes`."""
    duplicates: tuple[Duplicate, ...]
    states: dict[str, int]
    """Bytes by state."""

    @property
    def wasted_bytes(self) -> int:
        """Bytes of weights that are stored more than once."""
        return sum(duplicate.wasted_bytes for duplicate in self.duplicates)

    @property
    def token_function(self) -> FunctionCosts:
        """The function that is called for every generated token."""
        if TOKEN_FUNCTION in self.functions:
            return self.functions[TOKEN_FUNCTION]
        return min(self.functions.values(), key=lambda function: (function.positions or 1, function.name))


@dataclass(frozen=True)
class Report:
    """A whole export."""

    parts: dict[str, PartReport]
    bytes_on_disk: int
    weight_bytes: int
    parameters: int
    """Of the model if given, else the weights that the packages store."""
    bits_per_parameter: float
    """Of the weight files."""
    bytes_per_token: int
    """Bytes of weights that one generated token reads."""
    cache_bytes: int
    """Key/value cache: states of one name are shared by the parts."""
    multiply_adds_per_token: int
    attention_multiply_adds_per_token: int
    """At full context: shapes are static, so every token pays for all of it."""
    dense_multiply_adds_per_token: int
    multiply_adds_ratio: float
    """Products with weights over those of the plain dense model: what ranks above 1 and adapters cost."""
    wasted_bytes: int


HEAD = ("part", "function", "operations", "weight bytes", "bits per weight", "theory", "multiply-adds", "bytes read")


def rows(report: Report) -> list[tuple[str, str, int, int, float | None, float | None, int, int]]:
    """A row per part and function under `HEAD`: theory is the size over the theoretical one, multiply-adds are per
    call and include attention."""
    return [
        (
            part.name,
            function.name,
            sum(function.operations.values()),
            part.weight_bytes,
            part.bits_per_weight,
            part.size_ratio,
            function.multiply_adds + function.attention_multiply_adds,
            function.bytes_read,
        )
        for part in report.parts.values()
        for function in part.functions.values()
    ]


def account_part(
    path: Path,
    name: str = "model",
    role: str = "model",
    positions: Mapping[str, int] | None = None,
    theory_bytes: int | None = None,
) -> PartReport:
    """Count one .mlpackage.

    Args:
        positions: tokens per call by function.
        theory_bytes: what the weights should take.

    Raises:
        ValueError: if the package is damaged or truncated.
    """
    functions = read_functions(read_spec(path))
    file = weight_file(path)
    weights = collect_weights(functions.values())
    by_kind = dict.fromkeys(KINDS, 0)
    for weight in weights:
        by_kind[weight.kind] += weight.bytes
    quantized = sum(weight.elements for weight in weights if weight.kind == "indices")
    stored = sum(weight.bytes for weight in weights if weight.offset is not None)
    used = by_kind["indices"] + by_kind["tables"] + by_kind["scales"]
    return PartReport(
        name=name,
        role=role,
        functions={key: function_costs(f, (positions or {}).get(key)) for key, f in functions.items()},
        bytes_on_disk=tree_size(path),
        weight_bytes=file.size,
        bytes_by_kind=by_kind,
        overhead_bytes=file.size - stored,
        quantized_weights=quantized,
        dense_weights=sum(weight.elements for weight in weights if weight.kind == "dense"),
        bits_per_weight=8 * used / quantized if quantized else None,
        theory_bytes=theory_bytes,
        size_ratio=file.size / theory_bytes if theory_bytes else None,
        duplicates=find_duplicates(functions, file),
        states={key: state.bytes for function in functions.values() for key, state in function.states.items()},
    )


def summarize(parts: Iterable[PartReport], parameters: int | None = None) -> Report:
    """The report of a whole export; `parameters` is the plain model's count."""
    found = {part.name: part for part in parts}
    token = [part.token_function for part in found.values()]
    weight_bytes = sum(part.weight_bytes for part in found.values())
    if parameters is None:
        parameters = sum(part.quantized_weights + part.dense_weights for part in found.values())
    products = sum(function.multiply_adds for function in token)
    dense = sum(function.dense_multiply_adds for function in token)
    states = {key: size for part in found.values() for key, size in part.states.items()}
    return Report(
        parts=found,
        bytes_on_disk=sum(part.bytes_on_disk for part in found.values()),
        weight_bytes=weight_bytes,
        parameters=parameters,
        bits_per_parameter=8 * weight_bytes / parameters if parameters else 0.0,
        bytes_per_token=sum(function.bytes_read for function in token),
        cache_bytes=sum(states.values()),
        multiply_adds_per_token=products,
        attention_multiply_adds_per_token=sum(function.attention_multiply_adds for function in token),
        dense_multiply_adds_per_token=dense,
        multiply_adds_ratio=products / dense if dense else 1.0,
        wasted_bytes=sum(part.wasted_bytes for part in found.values()),
    )


def account_bundle(bundle: Bundle, parameters: int | None = None) -> Report:
    """Count every part of a `bundle.Bundle`."""
    parts = [
        account_part(
            bundle.folder / part["file"], part["name"], part["role"], part["functions"], part.get("theory_bytes")
        )
        for part in bundle.meta["parts"]
    ]
    return summarize(parts, parameters)


# -- weights -------------------------------------------------------------------------------------------------------
def collect_weights(functions: Iterable[Function]) -> list[Weight]:
    """All constants in weight files and all tables, whatever their place, each once."""
    found: dict[int | str, Weight] = {}
    for function in functions:
        consumers = function.consumers()
        for operation in function.operations:
            for parameter, constant in operation.constants.items():
                kind = _kind(operation, parameter, constant, consumers)
                if constant.offset is None and kind not in ("indices", "tables", "scales"):
                    continue
                key = _label(operation, parameter) if constant.offset is None else constant.offset
                elements = _stored_elements(operation, constant, kind, consumers)
                found.setdefault(key, Weight(operation.name, kind, constant.offset, constant.tensor.bytes, elements))
    return list(found.values())


def find_duplicates(functions: Mapping[str, Function], file: WeightFile) -> tuple[Duplicate, ...]:
    """Entries of the weight file whose type and bytes are equal."""
    users: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    types: dict[int, str] = {}
    for function in functions.values():
        for operation in function.operations:
            for constant in operation.constants.values():
                if constant.offset is not None:
                    users.setdefault(constant.offset, set()).add(function.name)
                    names[constant.offset] = operation.name
                    types[constant.offset] = constant.tensor.dtype
    copies: dict[tuple[str, str], list[int]] = {}
    for offset in sorted(names):
        digest = hashlib.sha256(file.read(offset).data).hexdigest()
        copies.setdefault((types[offset], digest), []).append(offset)
    return tuple(
        Duplicate(
            tuple(names[offset] for offset in offsets),
            tuple(tuple(sorted(users[offset])) for offset in offsets),
            (len(offsets) - 1) * len(file.read(offsets[0])),
        )
        for offsets in copies.values()
        if len(offsets) > 1
    )


def _kind(
    operation: Operation, parameter: str, constant: Constant, consumers: Mapping[str, list[tuple[Operation, str]]]
) -> str:
    """One of `KINDS`, or the empty string for a literal that is no weight."""
    readers = consumers.get(operation.name, [])
    if operation.type.startswith("constexpr_"):
        kind = _CONSTEXPR_KINDS.get(parameter, "" if constant.offset is None else "other")
        return "scales" if kind and _multiplies(readers) else kind
    for reader, place in readers:
        if reader.type.startswith("constexpr_") and place in _CONSTEXPR_KINDS:
            return "scales" if _multiplies(consumers.get(reader.name, [])) else _CONSTEXPR_KINDS[place]
    if constant.offset is None:
        return ""
    if constant.tensor.dtype != "fp16":
        return "other"
    return "scales" if readers and all(reader.type == "mul" for reader, _ in readers) else "dense"


def _multiplies(readers: Iterable[tuple[Operation, str]]) -> bool:
    """Whether something is multiplied with elementwise, as scales are and weights never."""
    return any(reader.type == "mul" for reader, _ in readers)


def _stored_elements(
    operation: Operation, constant: Constant, kind: str, consumers: Mapping[str, list[tuple[Operation, str]]]
) -> int:
    """Weights that a constant stands for: an index may mean a vector, and a byte of older packages several indices."""
    if kind == "indices":
        readers = [operation, *(reader for reader, _ in consumers.get(operation.name, []))]
        for reader in readers:
            if reader.type.startswith("constexpr_"):
                return next(iter(reader.outputs.values())).elements
    return constant.tensor.elements


def _label(operation: Operation, parameter: str) -> str:
    return f"{operation.name}.{parameter}"
