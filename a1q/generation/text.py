"""Tokens as text while they come: never half a character, and thoughts apart from answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

OPENED, CLOSED = "<think>", "</think>"


class Decoder:
    """Text of tokens as soon as it is certain.

    Args:
        tokenizer: of transformers, with a fast tokenizer behind it.
    """

    def __init__(self, tokenizer: Any):
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def __call__(self, token: int) -> str:
        """What is certain with this token; nothing while a character is incomplete."""
        return self._stream.step(self._tokenizer, token) or ""


class Thoughts:
    """Cuts a text that comes in pieces into thoughts and what is said; the marks themselves are left out.

    Args:
        inside: the text begins within a thought, as where the prompt ends with its mark.
    """

    def __init__(self, inside: bool = False):
        self._inside, self._rest = inside, ""

    def __call__(self, piece: str) -> Iterator[tuple[bool, str]]:
        """(whether it is thought, text) of what is certain with this piece."""
        self._rest += piece
        while True:
            mark = CLOSED if self._inside else OPENED
            before, met, after = self._rest.partition(mark)
            if not met:
                break
            if before:
                yield self._inside, before
            self._inside, self._rest = not self._inside, after
        held = next((size for size in range(len(mark) - 1, 0, -1) if self._rest.endswith(mark[:size])), 0)
        certain, self._rest = self._rest[: len(self._rest) - held], self._rest[len(self._rest) - held :]
        if certain:
            yield self._inside, certain

    def end(self) -> Iterator[tuple[bool, str]]:
        """What was held back as a possible beginning of a mark."""
        if self._rest:
            yield self._inside, self._rest
        self._rest = ""


def begins_inside(prompt: str) -> bool:
    """Whether what follows this prompt begins within a thought."""
    return prompt.rfind(OPENED) > prompt.rfind(CLOSED)
