"""A saved program as it is written in a package: types, operations and constants, without decoding any weight.

`reader.read_package` gives the program to run; this gives the one to count and to inspect. Whether two functions share
a weight can only be seen here: they do when both name the same offset of the weight file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from a1q.coreml.reader import WEIGHTS
from a1q.coreml.weightfile import ENTRY, SENTINEL

BITS = {
    "bool": 8, "fp16": 16, "fp32": 32, "fp64": 64, "bf16": 16,
    "int4": 4, "int8": 8, "int16": 16, "int32": 32, "int64": 64,
    "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6, "uint8": 8, "uint16": 16, "uint32": 32, "uint64": 64,
}  # fmt: skip
"""Bits of one stored number, by type."""


@dataclass(frozen=True)
class Tensor:
    """The type of a value; a dimension that is not static is None."""

    dtype: str
    shape: tuple[int | None, ...]

    @property
    def elements(self) -> int:
        """Numbers in it; dimensions that are not static count as 1."""
        return math.prod(size or 1 for size in self.shape)

    @property
    def bytes(self) -> int:
        """Bytes it takes when packed."""
        return -(-self.elements * BITS.get(self.dtype, 0) // 8)


@dataclass(frozen=True)
class Constant:
    """A constant: in the weight file, or written into the program."""

    tensor: Tensor
    offset: int | None
    """Of its entry in the weight file; None if it is written into the program."""
    immediate: Any = None
    """The message that holds it, if it is written into the program."""


@dataclass(frozen=True)
class Operation:
    """One operation, constants included."""

    type: str
    name: str
    """Of the operation: its first output, or what it updates."""
    inputs: dict[str, tuple[str, ...]]
    """Parameter -> names of values."""
    constants: dict[str, Constant]
    """Parameter -> constant written at the operation itself."""
    outputs: dict[str, Tensor]

    @property
    def is_constant(self) -> bool:
        """Whether it is a `const` or computes one before the program runs."""
        return self.type == "const" or self.type.startswith("constexpr_")

    def argument(self, parameter: str) -> str | None:
        """Name of the only value of a parameter; None if it has none."""
        names = self.inputs.get(parameter, ())
        return names[0] if names else None


@dataclass(frozen=True)
class Function:
    """One function of a program."""

    name: str
    inputs: dict[str, Tensor]
    states: dict[str, Tensor]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    values: dict[str, Tensor] = field(repr=False)
    """Types of all values by name: inputs and results."""
    producers: dict[str, Operation] = field(repr=False)
    """The operation that makes a value."""

    def consumers(self) -> dict[str, list[tuple[Operation, str]]]:
        """Value name -> the operations that read it, each with the parameter."""
        found: dict[str, list[tuple[Operation, str]]] = {}
        for operation in self.operations:
            for parameter, names in operation.inputs.items():
                for name in names:
                    found.setdefault(name, []).append((operation, parameter))
        return found


@dataclass(frozen=True)
class WeightFile:
    """The entries of a package's weight file."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes; 0 if the package has no weight file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def read(self, offset: int) -> npt.NDArray[np.uint8]:
        """The bytes of the entry at `offset`, mapped, not loaded.

        Raises:
            ValueError: if there is no whole entry.
        """
        with open(self.path, "rb") as file:
            file.seek(offset)
            header = file.read(ENTRY.size)
        if len(header) == ENTRY.size:
            sentinel, _, size, begin, _ = ENTRY.unpack(header)
            if sentinel == SENTINEL and begin + size <= self.size:
                return np.memmap(self.path, np.uint8, "r", begin, (size,)) if size else np.zeros(0, np.uint8)
        raise ValueError(f"{self.path} has no whole entry at {offset}")


def weight_file(path: Path) -> WeightFile:
    """The weight file of an .mlpackage."""
    return WeightFile(path / WEIGHTS)


def read_functions(spec: Any) -> dict[str, Function]:
    """The functions of an ML program (`Model` message), by name."""
    return {name: _read_function(name, message) for name, message in sorted(spec.mlProgram.functions.items())}


def numbers(constant: Constant, weights: WeightFile) -> npt.NDArray[Any] | None:
    """The floating-point numbers of a constant, flat; None for other types."""
    if constant.tensor.dtype not in ("fp16", "fp32"):
        return None
    kind: np.dtype[Any] = np.dtype("<f2" if constant.tensor.dtype == "fp16" else "<f4")
    if constant.offset is not None:
        return weights.read(constant.offset).view(kind)
    tensor = constant.immediate.tensor
    if tensor.WhichOneof("value") == "bytes":
        return np.frombuffer(tensor.bytes.values, kind)
    return np.asarray(tensor.floats.values, kind)


def literal(function: Function, operation: Operation, parameter: str) -> Any:
    """The scalar boolean or integer that a parameter has as a constant; None where it has none."""
    constant = operation.constants.get(parameter)
    for name in operation.inputs.get(parameter, ()):
        if name in function.producers:
            constant = function.producers[name].constants.get("val")
    if constant is None or constant.immediate is None:
        return None
    tensor = constant.immediate.tensor
    values = getattr(tensor, tensor.WhichOneof("value") or "ints").values
    return values[0] if values else None


def _read_function(name: str, message: Any) -> Function:
    block = message.block_specializations[message.opset]
    inputs: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    for item in message.inputs:
        (states if item.type.WhichOneof("type") == "stateType" else inputs)[item.name] = _tensor(item.type)
    operations = tuple(_operations(block))
    values = {**inputs, **states}
    producers = {}
    for operation in operations:
        values.update(operation.outputs)
        producers.update(dict.fromkeys(operation.outputs, operation))
    return Function(name, inputs, states, tuple(block.outputs), operations, values, producers)


def _operations(block: Any) -> Iterator[Operation]:
    """The operations of a block and of the blocks inside them."""
    for message in block.operations:
        constants = {
            key: _constant(value) for key, value in message.attributes.items() if key != "name" and _is_tensor(value)
        }
        inputs = {}
        for key, argument in message.inputs.items():
            inputs[key] = tuple(b.name for b in argument.arguments if b.WhichOneof("binding") == "name")
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "value" and _is_tensor(binding.value):
                    constants[key] = _constant(binding.value)
        outputs = {output.name: _tensor(output.type) for output in message.outputs}
        name = next(iter(outputs), None) or next(iter(inputs.get("input", ())), message.type)
        yield Operation(message.type, name, inputs, constants, outputs)
        for inner in message.blocks:
            yield from _operations(inner)


def _is_tensor(value: Any) -> bool:
    return value.type.WhichOneof("type") == "tensorType"


def _constant(value: Any) -> Constant:
    if value.WhichOneof("value") == "blobFileValue":
        return Constant(_tensor(value.type), value.blobFileValue.offset)
    return Constant(_tensor(value.type), None, value.immediateValue)


def _tensor(message: Any) -> Tensor:
    """The type in a `ValueType` message; what is no tensor (a list, say) has its kind's name and no shape."""
    kind = message.WhichOneof("type")
    if kind == "stateType":
        return _tensor(message.stateType.wrappedType)
    if kind != "tensorType":
        return Tensor(str(kind), ())
    from coremltools.proto import MIL_pb2

    name = MIL_pb2.DataType.Name(message.tensorType.dataType)
    dtype = {"BFLOAT16": "bf16"}.get(name, name.lower().replace("float", "fp"))
    dimensions = message.tensorType.dimensions
    return Tensor(
        dtype, tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in dimensions)
    )
