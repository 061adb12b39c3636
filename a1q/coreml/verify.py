"""Does an exported folder compute what its model computes? Found out without a Mac.

The packages as saved are run over a text, the model's own continuation of it, and random tokens, in two ways: token
by token from the start, and `prefill` over the prompt followed by single tokens. Every logit vector that comes out is
compared with the PyTorch model's, in fp32, which shows whether the graph is the model, and in emulated fp16, which
shows whether the numbers fit. Where fp16 goes its own way is found by running both side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.coreml.constants import Constants
from a1q.coreml.divergence import Divergence, trace_bundle
from a1q.coreml.figures import Figures, Tally
from a1q.coreml.reference import Reference
from a1q.coreml.runner import Backend, InterpreterBackend, Runner, make_runner
from a1q.coreml.thresholds import Verify
from a1q.errors import UsageError

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle
    from a1q.coreml.interpreter import Precision
    from a1q.coreml.operations import Array

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
DEVICE = "coreml"
"""The figures of Core ML itself."""
TRACED = 2
"""Tokens after the prompt over which both precisions are compared operation by operation."""


@dataclass(frozen=True)
class Report:
    """What came out."""

    figures: Mapping[str, Figures]
    """By precision of the interpreter, and `coreml` where that ran."""
    failures: list[str]
    """What of the thresholds was not reached, one sentence each; empty for a good package."""
    divergence: Divergence
    """fp16 beside fp32, operation by operation, over the first prompt and `TRACED` tokens."""

    def metrics(self) -> dict[str, Any]:
        """All figures as `cosine_fp32`, ..., and what `trace` says."""
        return {
            **{
                f"{name}_{way}": value for way, found in self.figures.items() for name, value in found.as_json().items()
            },
            **self.trace(),
        }

    def trace(self) -> dict[str, Any]:
        """Where fp16 leaves fp32, and the largest activations, as JSON.

        `leaves_fp32_at`: the first operation of fp16 more than 5 % off, or null. `peak`, `peak_at`: the largest
        activation and its operation. `layer_peaks`: the largest of every layer. `most_rounded`: the operations that
        add most error by themselves, and how much.
        """
        found = self.divergence
        peaks = found.peaks()
        highest = max(peaks.values(), key=lambda deviation: deviation.peak)
        return {
            "leaves_fp32_at": None if found.first is None else str(found.first.place),
            "peak": highest.peak,
            "peak_at": str(highest.place),
            "layer_peaks": {str(layer): deviation.peak for layer, deviation in peaks.items() if layer is not None},
            "most_rounded": {str(deviation.place): deviation.own for deviation in found.worst(3)},
        }


def verify_bundle(
    bundle: Bundle,
    references: Sequence[Reference],
    wanted: Verify,
    tick: Callable[[], None] = lambda: None,
    adapter: str | None = None,
    device: Backend | None = None,
) -> Report:
    """Interpret a bundle in fp32 and in fp16, one after the other, and compare.

    Args:
        tick: called after every call of the runner; `total_calls` says how often.
        adapter: see `runner.make_runner`.
        device: Core ML, to be compared as well: it must reach what fp16 must.

    Raises:
        UsageError: if the tokens do not fit the package's context.
    """
    check_length(bundle, [len(reference.tokens) for reference in references])
    weights = Constants()
    figures: dict[str, Figures] = {}
    for precision in PRECISIONS:
        backend = InterpreterBackend(bundle, precision, weights)
        found = compare(make_runner(bundle, backend, adapter), references, tick)
        figures[precision] = found.figures(backend.overflows)
    divergence = _trace(bundle, references[0], adapter, weights)
    if device is not None:
        figures[DEVICE] = compare(make_runner(bundle, device, adapter), references, tick).figures({})
    return Report(figures, failures(figures, wanted), divergence)


def _trace(bundle: Bundle, reference: Reference, adapter: str | None, weights: Constants) -> Divergence:
    tokens = reference.tokens[: reference.prompt + TRACED].tolist()
    return trace_bundle(bundle, tokens, reference.prompt, adapter, weights=weights)


def check_length(bundle: Bundle, lengths: Sequence[int]) -> None:
    """Refuse tokens that the cache can't hold.

    Raises:
        UsageError: with both numbers, or if there is nothing to run.
    """
    if not lengths:
        raise UsageError("nothing to compare: neither text nor random tokens are asked for")
    if max(lengths) > bundle.context:
        raise UsageError(
            f"{max(lengths)} tokens, prompt and continuation, do not fit the package's context of {bundle.context}"
        )


def total_calls(references: Sequence[Reference], prefill: int, ways: int = len(PRECISIONS)) -> int:
    """How often `verify_bundle` ticks; `ways` counts the device too."""
    return ways * sum(
        len(reference.tokens) * (1 + reference.stepped) - reference.prompt + 1 + (reference.prompt > prefill)
        for reference in references
    )


@dataclass(frozen=True)
class Comparison:
    """The logits of a runner beside those of the model."""

    tally: Tally
    chosen: list[bool]
    """For every token that the model wrote: whether the runner, fed with all before, chose it too."""
    written: int
    """How many of them the runner writes by itself: until it first differs."""

    def figures(self, overflows: Mapping[str, int]) -> Figures:
        """All figures, with the numbers that were not finite by operation."""
        count = len(self.chosen)
        return self.tally.figures(
            choice_agreement=sum(self.chosen) / count if count else 1.0,
            greedy_agreement=self.written / count if count else 1.0,
            overflows=overflows,
        )


def compare(runner: Runner, references: Sequence[Reference], tick: Callable[[], None] = lambda: None) -> Comparison:
    """Run the references' tokens, both ways, and compare every logit vector."""
    tally, chosen, written = Tally(), [], 0
    for reference in references:
        choices = {}
        for position, logits in _both_ways(runner, reference):
            tally.add(reference.logits[position], reference.rounded[position], logits)
            choices[position] = int(logits.argmax())  # of the second way, which is the one that an app goes
            tick()
        end = len(reference.tokens)
        same = [choices[i - 1] == int(reference.tokens[i]) for i in range(end - reference.written, end)]
        chosen += same
        # Up to the first difference, being fed the model's tokens and writing freely are the same.
        written += next((i for i, agreed in enumerate(same) if not agreed), len(same))
    return Comparison(tally, chosen, written)


def _both_ways(runner: Runner, reference: Reference) -> Iterator[tuple[int, Array]]:
    """(position, logits after it): token by token; then prefill over the prompt and token by token from there."""
    tokens = reference.tokens.tolist()
    runner.reset()
    for position, token in enumerate(tokens if reference.stepped else ()):
        yield position, runner.step(token)
    chunk = int(runner.bundle.meta["prefill"])
    if reference.prompt > chunk:  # a full chunk by itself: the prompt's last one is mostly padding
        yield chunk - 1, runner.prefill(tokens[:chunk])
    yield reference.prompt - 1, runner.prefill(tokens[: reference.prompt])
    for position in range(reference.prompt, len(tokens)):
        yield position, runner.step(tokens[position])


def failures(figures: Mapping[str, Figures], wanted: Verify) -> list[str]:
    """What was not reached, as sentences."""
    fp32 = figures["fp32"]
    cosines = {"fp32": wanted.min_cosine, "fp16": wanted.min_cosine_fp16, DEVICE: wanted.min_cosine_fp16}
    found = [
        f"the cosine in {way} is {item.cosine:.8f}, wanted at least {cosines[way]}"
        for way, item in figures.items()
        if not item.cosine >= cosines[way]
    ]
    if not fp32.relative_error <= wanted.max_error:
        found.append(
            f"a logit in fp32 is off by {fp32.relative_error:.2g} standard deviations, wanted at most "
            f"{wanted.max_error}"
        )
    if not fp32.choice_agreement >= wanted.min_agreement:
        found.append(
            f"the package in fp32 chooses {fp32.choice_agreement:.0%} of the model's own continuation, wanted at least "
            f"{wanted.min_agreement:.0%}"
        )
    for way, item in figures.items():
        if item.overflows:
            found.append(f"{item.overflows} numbers are not finite in {way}, the first in {item.overflow_at}")
    return found
