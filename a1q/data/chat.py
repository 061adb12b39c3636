"""Conversations as text, and which of its tokens an assistant said.

A template that marks them itself (`{% generation %}`) is believed. Any other is asked for prefixes: what it writes of
the messages before an answer, with the prompt to answer, has to begin the whole text, and what it adds with the answer
has to follow there. Both ends have to be those of tokens: the tokens of the text up to there begin those of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.errors import MismatchError, Problem, StageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ASSISTANT = "assistant"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = Sequence[Mapping[str, str]]


class UnclearError(Exception):
    """Why it can't be told token by token what an assistant said."""


class Chat:
    """The chat template in a model's folder.

    Args:
        tokenizer: the folder's, which cuts the text into tokens.

    Raises:
        MismatchError: if there is no template.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        from transformers import AutoTokenizer

        self._templated: Any = AutoTokenizer.from_pretrained(folder)
        if self._templated.chat_template is None:
            hint = "use `format: text`, or a model that was trained to chat"
            raise MismatchError([Problem(f"the tokenizer in {folder} has no chat template", hint=hint)])
        self._tokenizer = tokenizer
        template = self._templated.chat_template
        self._marks = bool(MARKS.search(template if isinstance(template, str) else template.get("default", "")))
        added = self._templated.added_tokens_decoder.values()
        self._special = tuple(token.content for token in added if token.special)

    def text(self, messages: Messages, prompt: bool = False) -> str:
        """What the template makes of a conversation; with `prompt` also of an answer's beginning.

        Raises:
            StageError: if the template refuses it.
        """
        plain = [dict(message) for message in messages]
        try:
            return self._templated.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates raise what they like
            roles = ", ".join(message["role"] for message in messages)
            raise StageError(f"the chat template refuses a conversation of {roles}: {error}") from None

    def said(self, messages: Messages, text: str, ids: Sequence[int]) -> list[bool]:
        """Of the tokens `ids` of a conversation's `text`, those that an assistant said, the end of its turn included.

        Raises:
            UnclearError: if that can't be told.
        """
        if all(message["role"] != ASSISTANT for message in messages):
            return [False] * len(ids)
        if self._marks:
            return self._marked(messages, ids)
        found = [False] * len(ids)
        borders = self._borders(messages, text)
        pieces = self._tokenizer.encode_batch_fast([text[:border] for border in borders], add_special_tokens=False)
        for piece in pieces:
            if list(ids[: len(piece.ids)]) != piece.ids:
                raise UnclearError("an answer begins or ends inside a token")
        for begin, end in zip(pieces[::2], pieces[1::2], strict=True):
            found[len(begin.ids) : len(end.ids)] = [True] * (len(end.ids) - len(begin.ids))
        return found

    def _marked(self, messages: Messages, ids: Sequence[int]) -> list[bool]:
        plain = [dict(message) for message in messages]
        known = self._templated.apply_chat_template(
            plain, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if list(known["input_ids"]) != list(ids):
            raise UnclearError("transformers cuts the text into other tokens")
        return [bool(mark) for mark in known["assistant_masks"]]

    def _borders(self, messages: Messages, text: str) -> list[int]:
        """Where answers begin and end in `text`, in turns."""
        borders: list[int] = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            try:
                begin, whole = self.text(messages[:number], prompt=True), self.text(messages[: number + 1])
            except StageError as error:
                raise UnclearError(f"of a beginning of the conversation, {error}") from None
            if not text.startswith(begin) or not whole.startswith(begin):
                raise UnclearError("the chat template writes an answer's beginning otherwise when it prompts for one")
            said, content = self._trimmed(whole[len(begin) :]), message["content"].strip()
            if not text.startswith(said, len(begin)) and content and content in said:
                # Some put more before the last answer than before earlier ones, such as an empty thought.
                said = said[said.rindex(content) :]
            if not text.startswith(said, len(begin)):
                raise UnclearError("the chat template writes an answer otherwise once others follow")
            borders += [len(begin), len(begin) + len(said)]
        return borders

    def _trimmed(self, said: str) -> str:
        """Without the space behind the token that ends the turn, where there is such a token."""
        bare = said.rstrip()
        return bare if bare.endswith(self._special) else said
