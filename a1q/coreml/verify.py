"""Does an exported folder compute what its model computes? Found out without a Mac.

The packages as saved are run over a text, the model's own continuation of it, and random tokens, in two ways: token
by token from the start, and `prefill` over the prompt followed by single tokens. Every logit vector that comes out is
compared with the PyTorch model's, in fp32, which shows whether the graph is the model, and in emulated fp16, which
shows whether the numbers fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.coreml.figures import Figures, Tally
from a1q.coreml.reference import Reference
from a1q.coreml.runner import InterpreterBackend, Runner, make_runner
from a1q.coreml.thresholds import Verify
from a1q.errors import UsageError

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle
    from a1q.coreml.interpreter import Precision
    from a1q.coreml.operations import Array

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@dataclass(frozen=True)
class Report:
    """What came out."""

    figures: Mapping[Precision, Figures]
    failures: list[str]
    """What of the thresholds was not reached, one sentence each; empty for a good package."""

    def metrics(self) -> dict[str, Any]:
        """All figures as `cosine_fp32`, ..."""
        return {
            f"{name}_{precision}": value
            for precision, figures in self.figures.items()
            for name, value in figures.as_json().items()
        }


def verify_bundle(
    bundle: Bundle,
    references: Sequence[Reference],
    wanted: Verify,
    tick: Callable[[], None] = lambda: None,
    adapter: str | None = None,
) -> Report:
    """Interpret a bundle in fp32 and in fp16, one after the other, and compare.

    Args:
        tick: called after every call of the runner; `total_calls` says how often.
        adapter: see `runner.make_runner`.

    Raises:
        UsageError: if the tokens do not fit the package's context.
    """
    check_length(bundle, [len(reference.tokens) for reference in references])
    figures = {}
    for precision in PRECISIONS:
        backend = InterpreterBackend(bundle, precision)
        found = compare(make_runner(bundle, backend, adapter), references, tick)
        figures[precision] = found.figures(backend.overflows)
    return Report(figures, failures(figures, wanted))


def check_length(bundle: Bundle, lengths: Sequence[int]) -> None:
    """Refuse tokens that the cache can't hold.

    Raises:
        UsageError: with both numbers.
    """
    if max(lengths) > bundle.context:
        raise UsageError(
            f"{max(lengths)} tokens, prompt and continuation, do not fit the package's context of {bundle.context}"
        )


def total_calls(references: Sequence[Reference], prefill: int) -> int:
    """How often `verify_bundle` ticks."""
    return len(PRECISIONS) * sum(
        2 * len(reference.tokens) - reference.prompt + 1 + (reference.prompt > prefill) for reference in references
    )


@dataclass(frozen=True)
class Comparison:
    """The logits of a runner beside those of the model."""

    tally: Tally
    same: int
    """Tokens of the model's continuations that the runner wrote too before it first differed."""
    written: int
    """Tokens of the model's continuations."""

    def figures(self, overflows: Mapping[str, int]) -> Figures:
        """All figures, with the numbers that were not finite by operation."""
        return self.tally.figures(self.same / self.written if self.written else 1.0, overflows)


def compare(runner: Runner, references: Sequence[Reference], tick: Callable[[], None] = lambda: None) -> Comparison:
    """Run the references' tokens, both ways, and compare every logit vector."""
    tally, same = Tally(), 0
    for reference in references:
        choices = {}
        for position, logits in _both_ways(runner, reference):
            tally.add(reference.logits[position], reference.rounded[position], logits)
            choices[position] = int(logits.argmax())  # of the second way, which is the one that an app goes
            tick()
        same += _same_words(reference, choices)
    return Comparison(tally, same, sum(reference.written for reference in references))


def _both_ways(runner: Runner, reference: Reference) -> Iterator[tuple[int, Array]]:
    """(position, logits after it): token by token; then prefill over the prompt and token by token from there."""
    tokens = reference.tokens.tolist()
    runner.reset()
    for position, token in enumerate(tokens):
        yield position, runner.step(token)
    chunk = int(runner.bundle.meta["prefill"])
    if reference.prompt > chunk:  # a full chunk by itself: the prompt's last one is mostly padding
        yield chunk - 1, runner.prefill(tokens[:chunk])
    yield reference.prompt - 1, runner.prefill(tokens[: reference.prompt])
    for position in range(reference.prompt, len(tokens)):
        yield position, runner.step(tokens[position])


def _same_words(reference: Reference, choices: Mapping[int, int]) -> int:
    """How many tokens of the model's continuation the runner writes by itself before it first differs.

    `choices` by position were made while it was fed the model's own tokens. Up to the first difference that is the same
    as writing freely, so there is nothing to run again.
    """
    end = len(reference.tokens)
    places = range(end - reference.written, end)
    wrong = (i for i, place in enumerate(places) if choices[place - 1] != reference.tokens[place])
    return next(wrong, reference.written)


def failures(figures: Mapping[Precision, Figures], wanted: Verify) -> list[str]:
    """What was not reached, as sentences."""
    fp32, fp16 = figures["fp32"], figures["fp16"]
    found = []
    for name, value, least in (
        ("cosine in fp32", fp32.cosine, wanted.min_cosine),
        ("cosine in fp16", fp16.cosine, wanted.min_cosine_fp16),
        ("share of equal greedy tokens in fp32", fp32.greedy_agreement, wanted.min_agreement),
    ):
        if not value >= least:
            found.append(f"{name} is {value:.8f}, wanted at least {least}")
    if not fp32.relative_error <= wanted.max_error:
        found.append(
            f"a logit in fp32 is off by {fp32.relative_error:.2g} standard deviations, wanted at most "
            f"{wanted.max_error}"
        )
    for precision, item in figures.items():
        if item.overflows:
            found.append(f"{item.overflows} numbers are not finite in {precision}, the first in {item.overflow_at}")
    return found
