"""One answer: a prompt read, text written piece by piece, and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from a1q.generation.loading import Voice
from a1q.generation.sampling import Sampler
from a1q.generation.text import Decoder
from a1q.generation.writers import write

CTRL_C = "Ctrl-C"


@dataclass
class Answer:
    """What was written, and how fast."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    """The token that ended it included."""
    prompt_tokens: int = 0
    read_tokens: int = 0
    """Of the prompt, those that were not known from the text before."""
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    stopped_at: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of writing: of the tokens behind the first one, which comes with reading."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of reading what was not known."""
        return self.read_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def figures(self) -> str:
        """One line for people."""
        if not self.tokens:
            return f"stopped at {self.stopped_at}"
        known = self.prompt_tokens - self.read_tokens
        read = f"read {self.read_tokens} tokens" + (f" ({known} known)" if known else "")
        read += f" in {self.prompt_seconds:.1f} s, {self.prompt_tokens_per_second:.1f} tokens/s"
        wrote = f"wrote {len(self.tokens)} in {self.seconds:.1f} s"
        if self.tokens_per_second:
            wrote += f", {self.tokens_per_second:.1f} tokens/s"
        return f"{read}, {wrote}, stopped at {self.stopped_at}"


def answer(
    voice: Voice,
    prompt: Sequence[int],
    most: int,
    sampler: Sampler,
    ends: Collection[int],
    show: Callable[[str], None],
    interruptible: bool = False,
) -> Answer:
    """Let `voice` continue `prompt`.

    Args:
        most: tokens to write at most; of a context that ends before, those that fit.
        ends: tokens that end the answer.
        show: receives the text as it becomes certain.
        interruptible: Ctrl-C ends the answer instead of the program.

    Raises:
        StageError: if a logit is not finite.
    """
    found, decoder = Answer(prompt_tokens=len(prompt)), Decoder(voice.tokenizer)
    left = voice.writer.context - len(prompt)
    start = time.perf_counter()
    try:
        logits, found.read_tokens = voice.writer.begin(list(prompt))
        found.prompt_seconds = time.perf_counter() - start
        start = time.perf_counter()
        for token in write(voice.writer, logits, min(most, left), ends, sampler, prompt):
            found.tokens.append(token)
            found.seconds = time.perf_counter() - start
            piece = decoder(token)
            if piece:
                found.text += piece
                show(piece)
    except KeyboardInterrupt:
        if not interruptible:
            raise
        found.stopped_at = CTRL_C
        return found
    at_most = len(found.tokens) == most
    found.stopped_at = "the end of the text" if found.tokens[-1] in ends else (
        "--max-tokens" if at_most else "the end of the context"
    )  # fmt: skip
    rest = decoder.end()
    if rest:
        found.text += rest
        show(rest)
    return found
