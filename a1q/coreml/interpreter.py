"""Run a package's program without a Mac: in fp32, or as fp16 hardware would.

In `fp16` every result that the program declares fp16 is rounded to fp16, while sums inside one operation are kept
in fp32, as the Neural Engine does. It models that hardware; it is not bit-exact to it. In `fp32` nothing is rounded,
which leaves only what the graph says. Constants are what the package declares in both.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from a1q.coreml.constants import DECODERS, Constants
from a1q.coreml.movements import MOVEMENTS, Array
from a1q.coreml.operations import OPERATIONS

Precision = Literal["fp32", "fp16"]
State = dict[str, Array]
BLOCK = 1 << 15
"""Numbers rounded at once, so that those in between stay in the processor's cache."""

_STATES = ("read_state", "coreml_update_state")


@dataclass(frozen=True)
class Step:
    """One operation: what to call, on which values, and where its results go."""

    function: str
    place: int
    """Number of the operation in its function, constants not counted, from 0."""
    type: str
    inputs: Mapping[str, Any]
    """Input name -> value name, tuple of value names, or None."""
    outputs: tuple[str, ...]
    halves: tuple[bool, ...]
    """Whether each output is declared fp16."""
    last_uses: tuple[str, ...]
    """Values that nothing needs after this operation."""
    may_overwrite: bool
    """Whether a `slice_update` of a state goes back into that state at once."""

    @property
    def name(self) -> str:
        """Name of the first output."""
        return self.outputs[0]

    @property
    def reads(self) -> list[str]:
        """Names of the values that go in, constants included."""
        return list(_flat(self.inputs.values()))


@dataclass(frozen=True)
class Executed:
    """An operation that has just run."""

    step: Step
    arguments: Mapping[str, Any]
    exact: list[Any]
    """Results before they were rounded to fp16; equal to `results` where nothing was."""
    results: list[Any]


class Interpreter:
    """All functions of one program.

    Args:
        program: `coremltools.converters.mil.mil.Program`, as `reader.read_package` gives it.
        precision: `fp32` or `fp16`.
        weights: where dense constants are kept; give several interpreters the same one, and they share them.

    Raises:
        NotImplementedError: naming the operations this interpreter lacks.
    """

    def __init__(self, program: Any, precision: Precision, weights: Constants | None = None):
        self.precision = precision
        self.overflows: dict[str, int] = {}
        """Results that were not finite though what they were made of was, by operation name: how many so far."""
        self.constants: dict[str, dict[str, Any]] = {}
        """Constants by function and name; compressed weights stand here decoded."""
        self._steps: dict[str, list[Step]] = {}
        self._inputs: dict[str, dict[str, Any]] = {}
        self._states: dict[str, tuple[int, ...]] = {}
        self._outputs = {name: [var.name for var in f.outputs] for name, f in program.functions.items()}
        _refuse_unknown(program)
        weights = Constants() if weights is None else weights
        for name, function in program.functions.items():
            self._prepare(name, function, weights)

    def new_state(self) -> State:
        """States as a device creates them: zero. Programs that name a state alike can share one dictionary."""
        return {name: np.zeros(shape, np.float32) for name, shape in self._states.items()}

    def run(self, function: str, inputs: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Call one function; `state` is updated, and its arrays may be overwritten.

        Returns:
            Outputs by name, float32.

        Raises:
            ValueError: if an input is missing or unknown or has a shape that the function doesn't take.
        """
        walk = self.walk(function, inputs, state)
        while True:
            try:
                next(walk)
            except StopIteration as end:
                return dict(end.value)

    def walk(
        self, function: str, inputs: Mapping[str, Array], state: State
    ) -> Generator[Executed, None, dict[str, Array]]:
        """`run`, operation by operation: yields each one as it is done; the outputs are the generator's return value.

        What is yielded is valid until the next operation: a state may be overwritten then.
        """
        constants = self.constants[function]
        values: dict[str, Any] = self._accept(function, inputs)
        for step in self._steps[function]:
            if step.type == "read_state":
                values[step.name] = current = state[step.inputs["input"]]
                yield Executed(step, {}, [current], [current])
                continue
            arguments = {key: _resolve(ref, values, constants) for key, ref in step.inputs.items() if key != "state"}
            for name in step.last_uses:
                values.pop(name, None)
            if step.type == "coreml_update_state":
                state[step.inputs["state"]] = values[step.name] = current = arguments["value"]
                yield Executed(step, arguments, [current], [current])
                continue
            with np.errstate(all="ignore"):
                exact, results = self._execute(step, arguments, values)
            values.update(zip(step.outputs, results, strict=True))
            yield Executed(step, arguments, exact, results)
        return {name: _own(_resolve(name, values, constants), state) for name in self._outputs[function]}

    def _execute(self, step: Step, arguments: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[list[Any], Any]:
        call = OPERATIONS[step.type]
        if step.may_overwrite:
            found = call(**arguments, in_place=lambda box: _unseen(box, values))
        else:
            found = call(**arguments)
        exact = found if isinstance(found, list) else [found]
        if step.type in MOVEMENTS:
            return exact, exact
        results = [
            self._round(result, name, arguments) if half else result
            for result, name, half in zip(exact, step.outputs, step.halves, strict=True)
        ]
        return exact, results

    def _round(self, result: Array, name: str, arguments: Mapping[str, Any]) -> Array:
        """The fp16 numbers nearest to `result` (in `fp16`), and a note of those that are newly not finite."""
        if self.precision == "fp16":
            result = half_rounded(result)
        if not np.isfinite(result).all():
            new = count_new_infinities(result, arguments)
            if new:
                self.overflows[name] = self.overflows.get(name, 0) + new
        return result

    def _accept(self, function: str, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Inputs in their declared types, checked."""
        from coremltools.converters.mil.mil import types

        declared = self._inputs[function]
        if set(inputs) != set(declared):
            raise ValueError(f"{function} takes the inputs {', '.join(declared)}; it was given {', '.join(inputs)}")
        accepted: dict[str, Any] = {}
        for name, var in declared.items():
            array = np.asarray(inputs[name])
            # A dimension that is a symbol is one of several or of a range; only its operations know which fit.
            if len(array.shape) != len(var.shape) or any(
                isinstance(wanted, int | np.integer) and wanted != size
                for wanted, size in zip(var.shape, array.shape, strict=True)
            ):
                shape = tuple(size if isinstance(size, int | np.integer) else "?" for size in var.shape)
                raise ValueError(f"{function} takes {name} of shape {shape}; it was given {array.shape}")
            if not types.is_float(var.dtype):
                accepted[name] = array.astype(np.bool_ if var.dtype == types.bool else np.int32, copy=False)
            elif self.precision == "fp16" and var.dtype == types.fp16:
                accepted[name] = half_rounded(array)
            else:
                accepted[name] = array.astype(np.float32, copy=False)
        return accepted

    def _prepare(self, name: str, function: Any, weights: Constants) -> None:
        from coremltools.converters.mil.mil import types

        operations = [op for op in function.operations if not _is_constant(op)]
        kept = {var.name for var in function.outputs}
        last_use = {var.name: place for place, op in enumerate(operations) for var in _flat(op.inputs.values())}
        # Tables and indices that only a compressed weight reads are not constants of the computation.
        constants = {
            op.outputs[0].name: weights.value(op)
            for op in function.operations
            if _is_constant(op) and (op.outputs[0].name in last_use or op.outputs[0].name in kept)
        }
        ends: dict[int, list[str]] = {}
        for value, place in last_use.items():
            if value not in kept and value not in constants:
                ends.setdefault(place, []).append(value)
        self._steps[name] = [
            Step(
                function=name,
                place=place,
                type=op.op_type,
                inputs={key: _reference(var) for key, var in op.inputs.items() if var is not None},
                outputs=tuple(var.name for var in op.outputs),
                halves=tuple(var.dtype == types.fp16 for var in op.outputs),
                last_uses=tuple(ends.get(place, ())),
                may_overwrite=op.op_type == "slice_update" and _goes_back(op, operations[place + 1 : place + 2]),
            )
            for place, op in enumerate(operations)
        ]
        self._inputs[name] = {key: var for key, var in function.inputs.items() if not types.is_state(var.sym_type)}
        for key, var in function.inputs.items():
            if types.is_state(var.sym_type):
                self._states[key] = tuple(var.sym_type.wrapped_type().get_shape())
        self.constants[name] = constants


def half_rounded(array: Any) -> Array:
    """The fp16 numbers nearest to an array's, as float32; beyond 65504 infinite.

    By torch, a block at a time: NumPy converts one number after the other, and subnormal ones ten times as slowly.
    """
    import torch

    array = np.asarray(array)
    if array.dtype != np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(array.astype(np.float16).astype(np.float32))
    exact = np.require(array, requirements=["C", "W"]).reshape(-1)
    rounded = np.empty_like(exact)
    source, target = torch.from_numpy(exact), torch.from_numpy(rounded)
    for start in range(0, len(exact), BLOCK):
        target[start : start + BLOCK] = source[start : start + BLOCK].half()
    return rounded.reshape(array.shape)


def count_new_infinities(result: Array, arguments: Mapping[str, Any]) -> int:
    """Numbers of a result that are not finite though none of those at their place in the arguments is: an infinite
    mask that passes through isn't an overflow."""
    new = ~np.isfinite(result)
    for argument in _flat(arguments.values()):
        if isinstance(argument, np.ndarray) and np.issubdtype(argument.dtype, np.floating):
            try:
                new = new & np.broadcast_to(np.isfinite(argument), new.shape)
            except ValueError:
                continue  # of another shape: not an operation on numbers at the same place
    return int(new.sum())


def _refuse_unknown(program: Any) -> None:
    known = {*OPERATIONS, *DECODERS, *_STATES, "const"}
    unknown = {op.op_type for function in program.functions.values() for op in function.operations} - known
    if unknown:
        raise NotImplementedError(f"the interpreter has no operation {', '.join(sorted(unknown))}")


def _is_constant(op: Any) -> bool:
    return op.op_type == "const" or op.op_type in DECODERS


def _reference(var: Any) -> Any:
    return tuple(v.name for v in var) if isinstance(var, list | tuple) else var.name


def _resolve(ref: Any, values: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    if isinstance(ref, tuple):
        return tuple(_resolve(name, values, constants) for name in ref)
    return values[ref] if ref in values else constants[ref]


def _own(value: Array, state: State) -> Array:
    """An output that a later call can't change by overwriting a state."""
    return value.copy() if any(np.may_share_memory(value, array) for array in state.values()) else value


def _goes_back(op: Any, followers: list[Any]) -> bool:
    """Whether `op` changes a state's current value and the next operation puts the result into that same state.

    A cache of 100 MB would otherwise be copied twice per layer and token.
    """
    source = op.x.op
    if source is None or source.op_type not in _STATES or not followers:
        return False
    state = source.input if source.op_type == "read_state" else source.state
    follower = followers[0]
    return follower.op_type == "coreml_update_state" and follower.value is op.outputs[0] and follower.state is state


def _unseen(box: Array, values: Mapping[str, Any]) -> bool:
    """Whether no value that is still needed has a number inside `box`."""
    return not any(isinstance(value, np.ndarray) and np.may_share_memory(value, box) for value in values.values())


def _flat(items: Any) -> Any:
    for item in items:
        if isinstance(item, list | tuple):
            yield from _flat(item)
        elif item is not None:
            yield item
