"""Where fp16 leaves fp32: both precisions run side by side, operation by operation, over the same calls.

What is measured of an operation's result, all of it over the numbers of one call:

| figure | meaning |
|---|---|
| error | rms(fp16 - fp32) / rms(fp32): how far the result is off, errors that came in included |
| own | rms(rounded - exact) / rms(exact), `exact` the same in fp32 on the fp16 run's inputs: what it alone adds |
| growth | error over the largest error of its inputs, or over `UNIT`: what it makes of errors that came in |
| peak | largest magnitude in fp32; fp16 ends at 65504 |

Every operation rounds, so error is 2^-12 after the first one and drifts upwards from there. "The first operation where
fp16 leaves fp32" is therefore the first whose error passes a threshold far above one rounding, or which is not finite
in fp16 where it is in fp32. Left out are numbers that are infinite in both, and those that a mask hides: they would
drown the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.coreml.constants import Constants
from a1q.coreml.interpreter import Executed, Interpreter, State
from a1q.coreml.movements import MOVEMENTS, Array
from a1q.coreml.operations import OPERATIONS

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle

THRESHOLD = 0.05
"""Error at which fp16 counts as having left fp32: some two hundred roundings of the same number."""
UNIT = 2.0**-11
"""Largest relative error of one rounding to fp16."""
LARGEST = 65504.0
"""Largest fp16 number."""
HIDDEN = -10000.0
"""A mask hides what it adds less than this to."""
BLOCK = 1 << 13
"""Numbers compared at once."""
Call = tuple[str, Mapping[str, Array]]
"""Function and inputs."""


@dataclass(frozen=True)
class Place:
    """An operation in its program."""

    function: str
    number: int
    """In its function, constants not counted, from 0."""
    name: str
    type: str
    positional: bool
    """Whether it is computed from positions and constants alone, as masks and rotations are."""
    near: str
    """The last weight or other named constant of rank 2 or more that was used before, or by, this operation."""

    @property
    def layer(self) -> int | None:
        """The decoder layer, as the names of its weights say; None before the first one."""
        found = re.search(r"layers?[_.](\d+)", self.near)
        return int(found[1]) if found else None

    def __str__(self) -> str:
        near = f", near {self.near}" if self.near else ""
        return f"{self.type} {self.name} (operation {self.number} of {self.function}{near})"


@dataclass(frozen=True)
class Deviation:
    """What one operation did, at its worst over all calls. Figures: see the module."""

    place: Place
    call: int
    """Number of the call, from 0, in which `error` was largest (or, in `Divergence.first`, in which it left)."""
    error: float
    own: float
    growth: float
    peak: float

    @property
    def headroom(self) -> float:
        """How many times larger its numbers could be in fp16; below 1 they do not fit."""
        return LARGEST / self.peak if self.peak else float("inf")


@dataclass(frozen=True)
class Divergence:
    """What came out of a trace."""

    first: Deviation | None
    """The first operation, in order of execution, where fp16 left fp32; None if none did."""
    overflow: Deviation | None
    """The first operation that was not finite in fp16 although it was in fp32."""
    operations: Mapping[tuple[str, str], Deviation]
    """By function and operation, in order of execution; of those declared fp16 that compute."""

    def worst(self, count: int = 5) -> list[Deviation]:
        """The operations that added most by themselves."""
        return sorted(self.operations.values(), key=lambda deviation: -deviation.own)[:count]

    def growing(self, count: int = 5) -> list[Deviation]:
        """The operations that made most of the errors that came in, as a difference of nearly equal numbers does."""
        return sorted(self.operations.values(), key=lambda deviation: -deviation.growth)[:count]

    def peaks(self) -> dict[int | None, Deviation]:
        """The operation with the largest activations of each layer; None stands for what comes before the first."""
        found: dict[int | None, Deviation] = {}
        for deviation in self.operations.values():
            if deviation.place.positional:
                continue
            known = found.get(deviation.place.layer)
            if known is None or deviation.peak > known.peak:
                found[deviation.place.layer] = deviation
        return found


def trace(
    program: Any, calls: Iterable[Call], threshold: float = THRESHOLD, weights: Constants | None = None
) -> Divergence:
    """Make the same calls in fp32 and in fp16, each with a state of its own, and compare every operation.

    Args:
        program: as `reader.read_package` gives it.
        calls: (function, inputs) in order, the first on an empty state.
        threshold: error at which fp16 counts as having left fp32.
        weights: see `Interpreter`.
    """
    tracer = Tracer(threshold)
    weights = Constants() if weights is None else weights
    interpreters = Interpreter(program, "fp32", weights), Interpreter(program, "fp16", weights)
    states = interpreters[0].new_state(), interpreters[1].new_state()
    for function, inputs in calls:
        tracer.call(interpreters, function, inputs, states)
    return tracer.result()


def trace_bundle(
    bundle: Bundle,
    tokens: Sequence[int],
    prompt: int,
    adapter: str | None = None,
    threshold: float = THRESHOLD,
    weights: Constants | None = None,
) -> Divergence:
    """`trace` of an exported folder of any layout: prefill over the first `prompt` tokens, then one at a time."""
    from a1q.coreml.runner import make_runner

    backend = TracingBackend(bundle, threshold, weights)
    runner = make_runner(bundle, backend, adapter)
    runner.prefill(tokens[:prompt])
    for token in tokens[prompt:]:
        runner.step(token)
    return backend.tracer.result()


@dataclass
class Tracer:
    """Collects over calls, for programs that are called in turns (`trace` is enough for one).

    Args:
        threshold: error at which fp16 counts as having left fp32.
    """

    threshold: float = THRESHOLD
    calls: int = 0
    _first: Deviation | None = None
    _overflow: Deviation | None = None
    _found: dict[tuple[str, str], Deviation] = field(default_factory=dict)

    def call(
        self,
        interpreters: tuple[Interpreter, Interpreter],
        function: str,
        inputs: Mapping[str, Array],
        states: tuple[State, State],
        prefix: str = "",
        half_inputs: Mapping[str, Array] | None = None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Call one function in fp32 and fp16 and note every operation.

        Args:
            interpreters: of one program, in fp32 and in fp16.
            prefix: put before the function's name in places, to tell programs apart.
            half_inputs: inputs of the fp16 run where they are not the same.

        Returns:
            Outputs in fp32 and in fp16.
        """
        single = interpreters[0].walk(function, inputs, states[0])
        half = interpreters[1].walk(function, inputs if half_inputs is None else half_inputs, states[1])
        constants = interpreters[0].constants[function]
        # A mask that an app passes in says of positions what one made inside does.
        positional = {name for name, array in inputs.items() if not _is_float(array) or name.endswith("mask")}
        flow = _Flow(constants, positional)
        while True:
            try:
                exact = next(single)
            except StopIteration as end:
                outputs = end.value
                break
            rounded = next(half)
            flow.follow(exact)
            self._note(exact, rounded, flow, prefix)
        try:
            next(half)
        except StopIteration as end:
            self.calls += 1
            return outputs, end.value
        raise AssertionError("both precisions run the same operations")

    def result(self) -> Divergence:
        """Everything so far."""
        return Divergence(self._first, self._overflow, dict(self._found))

    def _note(self, single: Executed, half: Executed, flow: _Flow, prefix: str) -> None:
        step = single.step
        incoming = max((flow.errors.get(name, 0.0) for name in step.reads), default=0.0)
        if step.type in MOVEMENTS or step.type not in OPERATIONS:
            flow.errors.update(dict.fromkeys(step.outputs, incoming))  # moved, or put into a state: nothing computed
            return
        for i, name in enumerate(step.outputs):
            wanted, found, exact = (np.asarray(array) for array in (single.results[i], half.results[i], half.exact[i]))
            if not _is_float(wanted):
                continue
            shown = flow.shown(single, wanted)
            if shown is not None:
                wanted, found, exact = wanted[shown], found[shown], exact[shown]
            flow.errors[name] = error = relative_error(wanted, found)
            if not step.halves[i]:
                continue
            deviation = Deviation(
                place=Place(
                    prefix + step.function, step.place, name, step.type, step.name in flow.positional, flow.near
                ),
                call=self.calls,
                error=error,
                own=relative_error(exact, found),
                growth=error / max(incoming, UNIT) if np.isfinite(incoming) else 1.0,
                peak=_peak(wanted),
            )
            if error > self.threshold and self._first is None:
                self._first = deviation
            if self._overflow is None and np.isinf(error) and (np.isfinite(wanted) & ~np.isfinite(found)).any():
                self._overflow = deviation
            key = deviation.place.function, name
            self._found[key] = _worse(self._found[key], deviation) if key in self._found else deviation


class _Flow:
    """What is known of the values of one call as its operations go by."""

    def __init__(self, constants: Mapping[str, Any], positional: set[str]):
        self.constants = constants
        self.positional = positional
        """Values made of positions and constants alone."""
        self.errors: dict[str, float] = {}
        self.near = ""

    def follow(self, executed: Executed) -> None:
        """Take note of an operation that has run."""
        reads = executed.step.reads
        matrices = [name for name in reads if np.ndim(self.constants.get(name, 0)) >= 2]
        self.near = next((name for name in matrices if np.size(self.constants[name]) > 1), self.near)
        if executed.step.type == "gather" and matrices:
            return  # rows of a table: an embedding isn't a position
        if all(name in self.positional or name in self.constants for name in reads):
            self.positional.update(executed.step.outputs)

    def shown(self, executed: Executed, result: Array) -> Array | None:
        """Which numbers of a result no mask hides: booleans in its shape; None for all."""
        if executed.step.type != "add" or executed.step.name in self.positional:
            return None
        masks = [executed.arguments[key] for key, name in executed.step.inputs.items() if name in self.positional]
        if not masks:
            return None
        return np.logical_and.reduce([np.broadcast_to(np.asarray(mask) > HIDDEN, result.shape) for mask in masks])


def relative_error(wanted: Array, found: Array) -> float:
    """rms(found - wanted) / rms(wanted); infinite where `found` has a number that is not finite and `wanted` has not.

    Numbers that are not finite in both are left out; if `wanted` is 0, so is the error of a `found` of 0.
    """
    size = distance = 0.0
    for want, got in _blocks(wanted, found):
        finite, kept = np.isfinite(want), np.isfinite(got)
        if (finite & ~kept).any():
            return float("inf")
        if not finite.all() or not kept.all():
            want, got = want[finite & kept], got[finite & kept]
        wide = want.astype(np.float64)
        size += float(np.square(wide).sum())
        distance += float(np.square(got - wide).sum())
    if size:
        return float(np.sqrt(distance / size))
    return float("inf") if distance else 0.0


def _peak(array: Array) -> float:
    """The largest finite magnitude."""
    peaks = (np.abs(block[np.isfinite(block)]).max(initial=0) for (block,) in _blocks(array))
    return float(max(peaks, default=0.0))


def _blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Arrays of one size in pieces that stay in the processor's cache: at rank 32 and 64 positions, results have six
    million numbers, and temporaries of that size cost far more than the sums."""
    flat = [np.asarray(array).reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield tuple(array[start : start + BLOCK] for array in flat)


def _worse(known: Deviation, new: Deviation) -> Deviation:
    """Every figure at its largest, with the call of the largest error."""
    return replace(
        new if new.error > known.error else known,
        own=max(known.own, new.own),
        growth=max(known.growth, new.growth),
        peak=max(known.peak, new.peak),
    )


def _is_float(array: Any) -> bool:
    return bool(np.issubdtype(np.asarray(array).dtype, np.floating))


class TracingBackend:
    """A `runner.Backend` that runs a bundle in both precisions and traces them; what it returns is fp32.

    Where an output of one part is, as it stands, the input of another, the fp16 run gets its own; what a runner has
    cut or moved in between comes from fp32.
    """

    def __init__(self, bundle: Bundle, threshold: float = THRESHOLD, weights: Constants | None = None):
        self.name = "interpreter, fp32 and fp16"
        self.tracer = Tracer(threshold)
        self._bundle = bundle
        self._weights = Constants() if weights is None else weights
        self._interpreters: dict[str, tuple[Interpreter, Interpreter]] = {}
        self._outputs: dict[int, tuple[Array, Array]] = {}
        """fp32 and fp16 output by the identity of the first."""

    def new_state(self) -> tuple[State, State]:
        """One state for each precision, shared by all parts; forgets the outputs of earlier calls."""
        states: tuple[State, State] = {}, {}
        self._outputs.clear()
        for part in self._bundle.packages:
            for state, interpreter in zip(states, self._pair(part), strict=True):
                state.update(interpreter.new_state())
        return states

    def run(self, part: str, function: str, inputs: Mapping[str, Array], state: Any) -> dict[str, Array]:
        """See `Backend`."""
        own = {name: self._outputs[id(array)][1] for name, array in inputs.items() if id(array) in self._outputs}
        prefix = f"{part}: " if len(self._bundle.packages) > 1 else ""
        single, half = self.tracer.call(self._pair(part), function, inputs, state, prefix, {**inputs, **own})
        self._outputs = {id(array): (array, half[name]) for name, array in single.items()}
        return single

    def _pair(self, part: str) -> tuple[Interpreter, Interpreter]:
        if part not in self._interpreters:
            program = self._bundle.packages[part].program
            self._interpreters[part] = (
                Interpreter(program, "fp32", self._weights),
                Interpreter(program, "fp16", self._weights),
            )
        return self._interpreters[part]
