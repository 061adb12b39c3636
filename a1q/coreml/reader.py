"""Read a saved package back, as any machine can: its description, its program, its weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1q.coreml.package import WEIGHTS
from a1q.coreml.toolkit import coremltools


@dataclass(frozen=True)
class Package:
    """A package as read from disk."""

    path: Path
    program: Any
    """`coremltools.converters.mil.mil.Program`."""
    description: Any
    """The description message (`ModelDescription`): functions with inputs, outputs and states."""
    weight_bytes: int
    """Size of the weight file."""

    @property
    def operations(self) -> dict[str, int]:
        """Operations per function, constants not counted."""
        return {
            name: sum(op.op_type != "const" and not op.op_type.startswith("constexpr") for op in function.operations)
            for name, function in self.program.functions.items()
        }


def read_package(path: Path) -> Package:
    """Load `path` (.mlpackage).

    Raises:
        ValueError: if it is no ML program.
    """
    ct = coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.utils.load_spec(str(path))
    if model.WhichOneof("Type") != "mlProgram":
        raise ValueError(f"{path} is not an ML program")
    weights = path / WEIGHTS
    with _each_weight_once():
        program = load(model, model.specificationVersion, str(weights.parent))
    return Package(path, program, model.description, weights.stat().st_size if weights.exists() else 0)


@contextmanager
def _each_weight_once() -> Iterator[None]:
    """While this holds, coremltools gives functions that name the same weight the same array.

    By itself it reads a weight anew for every function: twice the time, and a byte of memory per index and function.
    """
    module: Any = importlib.import_module("coremltools.converters.mil.frontend.milproto.load")
    original = module._load_value
    known: dict[tuple[Any, ...], Any] = {}

    def load_value(context: Any, value: Any) -> Any:
        if value.WhichOneof("value") != "blobFileValue":
            return original(context, value)
        place = value.blobFileValue
        key = place.fileName, place.offset, value.type.SerializeToString()
        if key not in known:
            known[key] = original(context, value)
        return known[key]

    module._load_value = load_value
    try:
        yield
    finally:
        module._load_value = original
