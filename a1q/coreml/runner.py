"""Feed tokens to an exported folder as an app would, and get logits.

A `Backend` calls one function of one part; a `Runner` knows the layout: which parts to call, with which inputs, in
which order. So one runner serves the interpreter and Core ML itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from a1q.coreml.metafile import META
from a1q.errors import MismatchError

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle
    from a1q.coreml.constants import Constants
    from a1q.coreml.interpreter import Interpreter, Precision
    from a1q.coreml.operations import Array


class Backend(Protocol):
    """Something that computes the functions of a bundle's parts."""

    name: str
    """For people: what computes, and in which precision."""

    def new_state(self) -> Any:
        """An empty cache, shared by all parts."""

    def run(self, part: str, function: str, inputs: Mapping[str, Array], state: Any) -> dict[str, Array]:
        """Call one function; `state` is updated. Returns float32 outputs by name."""


class InterpreterBackend:
    """The interpreter, which needs no Mac; decoded weights of all parts stay in memory (4 bytes a weight).

    Args:
        weights: give several backends the same one, and they share what they decoded.
    """

    def __init__(self, bundle: Bundle, precision: Precision, weights: Constants | None = None):
        from a1q.coreml.constants import Constants

        self._bundle = bundle
        self._interpreters: dict[str, Interpreter] = {}
        self._weights = weights or Constants()
        self.precision = precision
        self.name = f"interpreter, {precision}"

    def interpreter(self, part: str) -> Interpreter:
        """The interpreter of one part, made at its first use."""
        if part not in self._interpreters:
            from a1q.coreml.interpreter import Interpreter

            try:
                program = self._bundle.packages[part].program
                self._interpreters[part] = Interpreter(program, self.precision, self._weights)
            except NotImplementedError as error:
                raise MismatchError(f"{self._bundle.packages[part].path}: {error}") from None
        return self._interpreters[part]

    def new_state(self) -> dict[str, Array]:
        """Zeros, as a device makes them; parts that name the same state share it."""
        state: dict[str, Array] = {}
        for part in self._bundle.packages:
            state.update(self.interpreter(part).new_state())
        return state

    def run(self, part: str, function: str, inputs: Mapping[str, Array], state: Any) -> dict[str, Array]:
        """See `Backend`.

        Raises:
            MismatchError: if the part is not what meta.json says.
        """
        interpreter = self.interpreter(part)
        try:
            return interpreter.run(function, inputs, state)
        except (ValueError, IndexError) as error:
            path = self._bundle.packages[part].path
            raise MismatchError(f"{path} can't be run as {META} says: {error}") from None

    @property
    def overflows(self) -> dict[str, int]:
        """Results that were not finite, by `part: operation`: how many numbers so far."""
        return {
            f"{part}: {operation}": count
            for part, interpreter in self._interpreters.items()
            for operation, count in interpreter.overflows.items()
        }


class Runner(ABC):
    """One text at a time: `prefill` the prompt, then `step` token by token."""

    def __init__(self, bundle: Bundle, backend: Backend):
        self.bundle = bundle
        self.backend = backend
        self.context = bundle.context
        self.vocabulary = bundle.vocabulary
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.state = self.backend.new_state()
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> Array:
        """Begin a text with these tokens.

        Returns:
            Logits after the last one, float32 [vocabulary].
        """
        if not 0 < len(tokens) <= self.context:
            raise ValueError(f"a prompt of {len(tokens)} tokens does not fit a context of {self.context}")
        self.reset()
        logits = self._prefill(np.asarray(tokens, np.int32))
        self.position = len(tokens)
        return logits

    def step(self, token: int) -> Array:
        """Continue the text by one token.

        Returns:
            Logits after it, float32 [vocabulary].
        """
        if self.position >= self.context:
            raise ValueError(f"the context of {self.context} positions is full")
        logits = self._step(int(token), self.position)
        self.position += 1
        return logits

    @abstractmethod
    def _prefill(self, tokens: Array) -> Array:
        """Logits after tokens int32 [count] at positions 0 to count - 1."""

    @abstractmethod
    def _step(self, token: int, position: int) -> Array:
        """Logits after one token."""


class SingleRunner(Runner):
    """One package that takes tokens and gives logits; mask and rotation are computed inside."""

    def __init__(self, bundle: Bundle, backend: Backend, adapter: str | None = None):
        super().__init__(bundle, backend)
        self.part = bundle.meta["parts"][0]["name"]
        self.chunk = int(bundle.meta["prefill"])
        self.suffix = "" if adapter is None else f"_{adapter}"

    def _prefill(self, tokens: Array) -> Array:
        logits = np.empty(0)
        for start in range(0, len(tokens), self.chunk):
            chunk = tokens[start : start + self.chunk]
            padded = np.zeros((1, self.chunk), np.int32)
            padded[0, : len(chunk)] = chunk
            logits = self._run("prefill", padded, start, last=np.array([len(chunk) - 1], np.int32))
        return logits

    def _step(self, token: int, position: int) -> Array:
        return self._run("infer", np.array([[token]], np.int32), position)

    def _run(self, function: str, ids: Array, position: int, **more: Array) -> Array:
        inputs = {"input_ids": ids, "position": np.array([position], np.int32), **more}
        outputs = self.backend.run(self.part, function + self.suffix, inputs, self.state)
        return np.concatenate([outputs[name].reshape(-1) for name in self.bundle.meta["outputs"]])


def adapters(bundle: Bundle) -> list[str]:
    """What may follow the names of the plain functions: `base` where `infer_base` stands beside `infer`."""
    found = {name: None for part in bundle.meta["parts"] for name in part["functions"] if name.startswith("infer_")}
    return [name.removeprefix("infer_") for name in found]


def check_adapter(bundle: Bundle, adapter: str | None) -> None:
    """Refuse functions that the bundle has not.

    Raises:
        MismatchError: with those it has.
    """
    known = adapters(bundle)
    if adapter is not None and adapter not in known:
        raise MismatchError(
            f"{bundle.folder} has no functions infer_{adapter}; it has {', '.join(known) or 'no others'}"
        )


def make_runner(bundle: Bundle, backend: Backend, adapter: str | None = None) -> Runner:
    """The runner of the bundle's layout.

    Args:
        adapter: one of `adapters(bundle)`: its functions instead of the plain ones.

    Raises:
        MismatchError: if the bundle has no such functions.
    """
    check_adapter(bundle, adapter)
    if bundle.meta["layout"] == "anemll":
        from a1q.coreml.anemll.runner import AnemllRunner

        return AnemllRunner(bundle, backend, adapter)
    return SingleRunner(bundle, backend, adapter)
