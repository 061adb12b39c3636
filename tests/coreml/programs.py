"""Small MIL programs, written and read back, for the tests that look at one thing in a package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from a1q.coreml.package import write_package
from a1q.coreml.toolkit import coremltools

Shape = tuple[int, ...]


def write_program(
    folder: Path,
    functions: Mapping[str, Callable[..., Any]],
    inputs: Mapping[str, tuple[Shape, str]],
    states: Mapping[str, tuple[Shape, str]] | None = None,
) -> Path:
    """Write a package whose functions are built by callables from placeholders by name; returns its path.

    Args:
        inputs: name -> (shape, type), of every function.
        states: the same for states.
    """
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    mb.name_count.clear()
    program = Program()
    for name, build in functions.items():
        kind = types.string_to_builtin
        made = {key: Placeholder(sym_shape=shape, dtype=kind(t), name=key) for key, (shape, t) in inputs.items()}
        for key, (shape, t) in (states or {}).items():
            made[key] = StateTensorPlaceholder(sym_shape=shape, dtype=kind(t), name=key)
        with Function(made, opset_version=ct.target.iOS18) as function:
            results = build(**function.inputs)
            function.set_outputs(results if isinstance(results, list) else [results])
        program.add_function(name, function)
    program.default_function_name = next(iter(functions))
    if len(functions) > 1:
        program.export_as_multifunction = True
    path = folder / "program.mlpackage"
    write_package(program, path)
    return path


def const(name: str, value: Any, shared: bool = True) -> Any:
    """A constant; if `shared`, stored once for all functions that name it so."""
    from coremltools.converters.mil import Builder as mb

    var = mb.const(val=value, name=name)
    if shared:
        var.op.weight_id = name
    return var
