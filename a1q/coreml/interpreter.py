"""Run a package's program without a Mac: in fp32, or as fp16 hardware would.

In `fp16` every result that the program declares fp16 is rounded to fp16, while sums inside one operation are kept
in fp32, as the Neural Engine does. It models that hardware; it is not bit-exact to it. In `fp32` nothing is rounded,
which leaves only what the graph says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from a1q.coreml.operations import MOVES, OPERATIONS, Array, decode_lut

Precision = Literal["fp32", "fp16"]
State = dict[str, Array]


@dataclass(frozen=True)
class _Step:
    """One operation: what to call, on which values, and where its results go."""

    type: str
    call: Callable[..., Any]
    inputs: Mapping[str, Any]
    """Input name -> value name, tuple of value names, or None."""
    outputs: tuple[str, ...]
    rounded: tuple[bool, ...]
    """Whether each output is declared fp16."""


class Interpreter:
    """All functions of one program.

    Args:
        program: `coremltools.converters.mil.mil.Program`, as `reader.read_package` gives it.
        precision: `fp32` or `fp16`.

    Raises:
        NotImplementedError: naming the operations this interpreter lacks.
    """

    def __init__(self, program: Any, precision: Precision):
        self.precision = precision
        self.overflows: dict[str, int] = {}
        """Results that were not finite, by operation name: how many numbers so far."""
        self._decoded: dict[str, Array] = {}
        self.constants: dict[str, dict[str, Array]] = {}
        """Constants by function and name; palettized weights stand here decoded."""
        self._steps: dict[str, list[_Step]] = {}
        self._states: dict[str, tuple[int, ...]] = {}
        for name, function in program.functions.items():
            self._prepare(name, function)
        self._outputs = {name: [var.name for var in f.outputs] for name, f in program.functions.items()}

    def new_state(self) -> State:
        """States as a device creates them: zero."""
        return {name: np.zeros(shape, np.float32) for name, shape in self._states.items()}

    def run(self, function: str, inputs: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Call one function; `state` is updated.

        Returns:
            Outputs by name, float32.
        """
        values: dict[str, Any] = {**self.constants[function], **inputs}
        with np.errstate(over="ignore", invalid="ignore"):
            for step in self._steps[function]:
                self._execute(step, values, state)
        return {name: values[name] for name in self._outputs[function]}

    def _execute(self, step: _Step, values: dict[str, Any], state: State) -> None:
        if step.type == "read_state":
            values[step.outputs[0]] = state[step.inputs["input"]].copy()
            return
        if step.type == "coreml_update_state":
            state[step.inputs["state"]] = values[step.outputs[0]] = values[step.inputs["value"]]
            return
        arguments = {
            key: tuple(values[name] for name in ref) if isinstance(ref, tuple) else None if ref is None else values[ref]
            for key, ref in step.inputs.items()
        }
        results = step.call(**arguments)
        for name, result, half in zip(
            step.outputs, results if isinstance(results, list) else [results], step.rounded, strict=True
        ):
            values[name] = self._round(result, name) if half and step.type not in MOVES else result

    def _round(self, result: Array, name: str) -> Array:
        """The fp16 numbers nearest to `result` (in `fp16`), and a note of those that are not finite."""
        if self.precision == "fp16":
            result = result.astype(np.float16).astype(np.float32)
        if not np.isfinite(result).all():
            self.overflows[name] = self.overflows.get(name, 0) + int((~np.isfinite(result)).sum())
        return result

    def _prepare(self, name: str, function: Any) -> None:
        from coremltools.converters.mil.mil import types

        constants: dict[str, Array] = {}
        steps = []
        unknown = set()
        operations = list(function.operations)
        last_use = {var.name: place for place, op in enumerate(operations) for var in _flat(op.inputs.values())}
        for place, op in enumerate(operations):
            if op.op_type == "const":
                constants[op.outputs[0].name] = _widen(op.outputs[0].val)
                continue
            if op.op_type == "constexpr_lut_to_dense":
                constants[op.outputs[0].name] = self._decode(op)
                continue
            if op.op_type not in OPERATIONS and op.op_type not in ("read_state", "coreml_update_state"):
                unknown.add(op.op_type)
                continue
            call = OPERATIONS.get(op.op_type, _no_call)
            if op.op_type == "slice_update" and _may_overwrite(op, place, operations, last_use):
                call = _slice_update_in_place
            inputs = {
                key: None if var is None else tuple(v.name for v in var) if isinstance(var, list | tuple) else var.name
                for key, var in op.inputs.items()
            }
            outputs = tuple(var.name for var in op.outputs)
            rounded = tuple(var.dtype == types.fp16 for var in op.outputs)
            steps.append(_Step(op.op_type, call, inputs, outputs, rounded))
        if unknown:
            raise NotImplementedError(f"the interpreter has no operation {', '.join(sorted(unknown))}")
        for key, var in function.inputs.items():
            if types.is_state(var.sym_type):
                self._states[key] = tuple(var.sym_type.wrapped_type().get_shape())
        self.constants[name] = constants
        self._steps[name] = steps

    def _decode(self, op: Any) -> Array:
        """The dense weight of a palettized one, decoded once for all functions."""
        indices, lut = op.indices.val, op.lut.val
        key = hashlib.sha256(indices.tobytes() + lut.tobytes() + repr((indices.shape, lut.shape)).encode()).hexdigest()
        if key not in self._decoded:
            self._decoded[key] = _widen(decode_lut(indices, lut))
        return self._decoded[key]


def _no_call(**arguments: Any) -> Any:
    raise AssertionError("states are handled by the interpreter")


def _slice_update_in_place(**arguments: Any) -> Array:
    return OPERATIONS["slice_update"](**arguments, in_place=True)


def _may_overwrite(op: Any, place: int, operations: list[Any], last_use: Mapping[str, int]) -> bool:
    """Whether the state's array may be changed instead of copied: nothing reads the old value any more, and the
    new one goes into the state at once. A cache of 100 MB would otherwise be copied twice per layer and token."""
    follower = operations[place + 1] if place + 1 < len(operations) else None
    source = op.x.op
    return (
        last_use[op.x.name] == place
        and source is not None
        and source.op_type in ("read_state", "coreml_update_state")
        and follower is not None
        and follower.op_type == "coreml_update_state"
        and follower.value is op.outputs[0]
    )


def _flat(items: Any) -> Any:
    for item in items:
        if isinstance(item, list | tuple):
            yield from _flat(item)
        elif item is not None:
            yield item


def _widen(value: Any) -> Any:
    """float16 as float32; integers narrower than 32 bits as int32."""
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic) and value.ndim == 0 and not np.issubdtype(value.dtype, np.floating):
        return value.item()
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float16 else array
