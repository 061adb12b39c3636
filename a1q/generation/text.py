"""Tokens as text while they come: never half a character, and thoughts apart from answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

OPENED, CLOSED = "<think>", "</think>"
BROKEN = "\ufffd"
"""What decoders put in the place of bytes that are no text."""
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""Tokens of one byte, in vocabularies that fall back to bytes (Llama 2, Mistral, Gemma)."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Decoder:
    """Text of tokens as soon as it is certain; special tokens are left out.

    All pieces together are what the tokenizer makes of all tokens. Tokens of one byte wait for the next other one: a
    run of them is text as a whole, or else broken as a whole, so one more can take back what was text
    (`tokenizers.decoders.DecodeStream` raises an error then, which models of few bits meet).

    Args:
        tokenizer: of transformers, with a fast tokenizer behind it.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer.backend_tokenizer
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._special = {number for number, token in added if token.special}
        self._tokens: list[int] = []  # those of the last piece, what follows being decoded behind them, and new ones
        self._given = 0

    def __call__(self, token: int) -> str:
        """What is certain with this token; nothing while a character is incomplete."""
        self._tokens.append(token)
        word = self._tokenizer.id_to_token(token)
        if word is None or token in self._special or BYTE.fullmatch(word):
            return ""
        return self._piece(lambda text: not text.endswith(BROKEN))

    def end(self) -> str:
        """What was held back, whole or not."""
        return self._piece(lambda text: True)

    def _piece(self, certain: Callable[[str], bool]) -> str:
        text = self._tokenizer.decode(self._tokens)
        if not certain(text):
            return ""
        piece = text[len(self._tokenizer.decode(self._tokens[: self._given])) :]
        if piece:  # tokens without text would leave what follows at the beginning, where decoders strip a space
            self._tokens = self._tokens[self._given :]
        self._given = len(self._tokens)
        return piece


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


def said(text: str, inside: bool = False) -> str:
    """What a text says less its thoughts, those included that didn't come to an end.

    Args:
        inside: the text begins within a thought.
    """
    _, closed, rest = text.rpartition(CLOSED)
    if inside and not closed:
        return ""
    spoken, _, _ = rest.partition(OPENED)
    return spoken.lstrip("\n") if closed else spoken


def harmless(text: str) -> str:
    """A text as a terminal may get it: what would move its cursor or change its settings is replaced."""
    return CONTROL.sub(BROKEN, text)
