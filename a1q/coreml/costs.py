"""What one call of a function costs: operations, multiply-adds, bytes of weights.

Multiply-adds are those of `conv`, `linear` and `matmul`; element-wise operations are not counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from a1q.coreml.spec import Constant, Function, Operation, literal

SHAPE_ONLY = {
    "cast", "concat", "expand_dims", "identity", "reshape", "slice_by_index", "slice_by_size", "squeeze", "transpose",
}  # fmt: skip
"""Operations through which a constant stays the same constant."""
_ADAPTER = re.compile(r"_[AB](_\d+)?$")
"""How a1q names the two factors of an adapter."""
Origins = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class FunctionCosts:
    """One function, per call."""

    name: str
    positions: int | None
    """Tokens it takes per call, where known."""
    operations: dict[str, int]
    """Number of operations by type, constants not counted."""
    multiply_adds: int
    """Products with weights."""
    attention_multiply_adds: int
    """Products of two activations: they grow with the context."""
    dense_multiply_adds: int
    """What the products with weights would be in the plain dense model: rank 1 everywhere, no adapters."""
    bytes_read: int
    """Bytes of the constants it touches, each once; of a table that is only gathered from, the rows."""


def function_costs(function: Function, positions: int | None = None) -> FunctionCosts:
    """Count one function."""
    origins = constant_origins(function)
    products, attention, dense = 0, 0, 0
    for operation in function.operations:
        count = _multiply_adds(function, operation)
        weights = _weights(operation, origins)
        if not weights:
            attention += count
            continue
        products += count
        if not any(_ADAPTER.search(name) for name in weights):
            dense += count // _ranks(function, operation, origins)
    return FunctionCosts(
        name=function.name,
        positions=positions,
        operations=dict(sorted(Counter(op.type for op in function.operations if not op.is_constant).items())),
        multiply_adds=products,
        attention_multiply_adds=attention,
        dense_multiply_adds=dense,
        bytes_read=_bytes_read(function, origins),
    )


def constant_origins(function: Function) -> dict[str, frozenset[str]]:
    """Values that are constants, or constants in another shape -> the constants they come from."""
    found: dict[str, frozenset[str]] = {}
    for operation in function.operations:
        sources = [name for key in ("x", "values") for name in operation.inputs.get(key, ())]
        if operation.is_constant:
            found[operation.name] = frozenset([operation.name])
        elif operation.type in SHAPE_ONLY and sources and all(name in found for name in sources):
            for output in operation.outputs:
                found[output] = frozenset().union(*(found[name] for name in sources))
    return found


def _multiply_adds(function: Function, operation: Operation) -> int:
    """Numbers of the result times the length of the sums that make each of them."""
    if operation.type not in ("conv", "linear", "matmul"):
        return 0
    results = next(iter(operation.outputs.values())).elements
    if operation.type == "matmul":
        shape = function.values[operation.inputs["x"][0]].shape
        return results * (shape[-2 if literal(function, operation, "transpose_x") else -1] or 1)
    return results * math.prod(size or 1 for size in function.values[operation.inputs["weight"][0]].shape[1:])


def _weights(operation: Operation, origins: Origins) -> frozenset[str]:
    """The constants that a product multiplies with; empty if it has two activations."""
    operands = ("x", "y") if operation.type == "matmul" else ("weight",)
    names = [name for operand in operands for name in operation.inputs.get(operand, ())]
    return frozenset().union(*(origins.get(name, frozenset()) for name in names))


def _ranks(function: Function, operation: Operation, origins: Origins) -> int:
    """How many copies of its input a convolution works on: x (1, in, 1, S) was multiplied by factors (1, in, r, 1)."""
    producer = function.producers.get(operation.inputs["x"][0])
    if operation.type != "conv" or producer is None or producer.type != "mul":
        return 1
    operands = [*producer.inputs.get("x", ()), *producer.inputs.get("y", ())]
    factors = [function.values[name].shape for name in operands if name in origins]
    inputs = [function.values[name].shape for name in operands if name not in origins]
    if len(factors) == len(inputs) == 1 and len(factors[0]) == len(inputs[0]) == 4 and inputs[0][2] == 1:
        return factors[0][2] or 1
    return 1


def _bytes_read(function: Function, origins: Origins) -> int:
    """Bytes of the constants that one call touches; a gather touches as many rows as it has indices."""
    shares: dict[str, Fraction] = {}
    for operation in function.operations:
        if operation.is_constant or set(operation.outputs) & origins.keys():
            continue
        for parameter, names in operation.inputs.items():
            for name in names:
                share = Fraction(1)
                if operation.type == "gather" and parameter == "x":
                    share = _gathered(function, operation)
                for origin in origins.get(name, frozenset()):
                    shares[origin] = max(shares.get(origin, Fraction(0)), share)
    read: dict[int, int] = {}
    for origin, share in shares.items():
        for offset, constant, common in _stored(function, origin):
            size = constant.tensor.bytes
            read[offset] = max(read.get(offset, 0), size if common else math.ceil(share * size))
    return sum(read.values())


def _gathered(function: Function, operation: Operation) -> Fraction:
    """The share of a table's rows that a gather takes."""
    axis = int(literal(function, operation, "axis") or 0)
    rows = function.values[operation.inputs["x"][0]].shape[axis] or 1
    indices = function.values[operation.inputs["indices"][0]].elements
    return min(Fraction(1), Fraction(indices, rows))


def _stored(function: Function, name: str) -> Iterator[tuple[int, Constant, bool]]:
    """What a constant is made of in the weight file: offset, constant, and whether all of its rows need all of it
    (a single table, scales of all rows)."""
    operation = function.producers[name]
    for parameter, constant in operation.constants.items():
        if constant.offset is not None:
            yield constant.offset, constant, parameter != "val" and constant.tensor.shape[:1] == (1,)
    for names in operation.inputs.values():
        for source in names:
            yield from _stored(function, source)
