"""MIL programs of one operation, to compare the interpreter's operations with torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from a1q.coreml.interpreter import Interpreter
from a1q.coreml.toolkit import coremltools

Case = tuple[Callable[..., Any], list[Any], Any]
"""How to build the operation from (mb, inputs), its inputs, and what torch says of them."""


def program_of(build: Callable[..., Any], arrays: Sequence[Any], half: bool = False) -> Any:
    """A program `main` whose inputs x, y, z are like `arrays` (fp16 if `half`) and whose outputs `build` returns."""
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types

    kinds = {np.dtype(np.int32): types.int32, np.dtype(np.bool_): types.bool}
    inputs = {
        name: Placeholder(
            sym_shape=array.shape, dtype=kinds.get(array.dtype, types.fp16 if half else types.fp32), name=name
        )
        for name, array in zip("xyz", arrays, strict=False)
    }
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        built = build(mb, *function.inputs.values())
        function.set_outputs(list(built) if isinstance(built, list | tuple) else [built])
    program = Program()
    program.add_function("main", function)
    return program


def run(build: Callable[..., Any], arrays: Sequence[Any], precision: Any = "fp32", half: bool = False) -> list[Any]:
    """The outputs of one operation."""
    interpreter = Interpreter(program_of(build, arrays, half), precision)
    return list(interpreter.run("main", dict(zip("xyz", arrays, strict=False)), {}).values())


def check(case: Case, rtol: float = 3e-6, atol: float = 3e-6) -> None:
    """Interpret a case in fp32 and compare numbers and shapes with torch's."""
    build, arrays, expected = case
    wanted = expected if isinstance(expected, list | tuple) else [expected]
    found = run(build, arrays)
    assert len(found) == len(wanted)
    for result, tensor in zip(found, wanted, strict=True):
        reference = torch.as_tensor(tensor)
        assert np.shape(result) == tuple(reference.shape)
        np.testing.assert_allclose(np.asarray(result, np.float64), reference.double().numpy(), rtol=rtol, atol=atol)
