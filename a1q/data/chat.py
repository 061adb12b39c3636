"""Conversations as text, in training as in generation, and which of its tokens an assistant said.

A template that marks them itself (`{% generation %}`) is believed. Of most others `a1q.data.turns` knows what stands
around an answer. Any other is asked for prefixes: what it writes of the messages before an answer, with the prompt to
answer, has to begin the whole text, and what it adds with the answer has to follow there. Both ends have to be those of
tokens: the tokens of the text up to there begin those of the whole.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.data.templates import SWITCH, default_of, refusal
from a1q.data.turns import Turns, learn
from a1q.engine.artifact import canonical_json, sha256_bytes
from a1q.errors import MismatchError, StageError

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer

ASSISTANT = "assistant"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
THOUGHT = ("<think>", "</think>")
PROBES: tuple[tuple[Mapping[str, str], ...], ...] = (
    ({"role": "user", "content": "Why?"},),
    (
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Really so?\n"},
    ),
)
"""Conversations whose prompts `prompts_digest` takes."""
Messages = Sequence[Mapping[str, str]]


class UnclearError(Exception):
    """Why it can't be told token by token what an assistant said."""


class Chat:
    """The chat template in a model's folder.

    With `thinking` True or False, what a model learns from begins with the very prompt that it is given later, token by
    token: `pieces` are `prompt` of all but the last message, and the answer with the end of the turn. With None the
    template does as it does by itself.

    Args:
        tokenizer: the folder's, which cuts the text into tokens.
        thinking: what the template is told about thinking; None: nothing.

    Raises:
        MismatchError: if there is no template, or it can't be told to think.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, thinking: bool | None = None):
        from transformers import AutoTokenizer

        self._templated: Any = AutoTokenizer.from_pretrained(folder)
        template = default_of(self._templated.chat_template)
        if (problem := refusal(template, bool(thinking), str(folder))) is not None:
            raise MismatchError([problem])
        assert template is not None
        self._tokenizer = tokenizer
        self._marks = bool(MARKS.search(template))
        self.thinks = SWITCH in template
        """Whether the template can be told whether to think."""
        self._thinking = thinking if self.thinks else None
        self._switches = {} if self._thinking is None else {SWITCH: self._thinking}
        added = self._templated.added_tokens_decoder.values()
        self._special = tuple(token.content for token in added if token.special)
        simple = self._thinking is not None or not self._marks
        self._turns: Turns | None = None
        self._turns = learn(self.example, self.prompt, tokenizer, self._special) if simple else None

    def prompt(self, messages: Messages) -> str:
        """The text that asks for an answer to a conversation, its beginning included.

        Raises:
            StageError: if the template refuses it.
        """
        return self._rendered(messages, True)

    def pieces(self, messages: Messages) -> list[str]:
        """The text of a conversation to learn from, in pieces that become tokens one by one.

        Raises:
            StageError: if the template refuses it, or doesn't write an answer as it stands.
        """
        if self._thinking is None or not messages or messages[-1]["role"] != ASSISTANT:
            return [self._rendered(messages, False)]
        return [self.prompt(messages[:-1]), self._answered(messages)[-1]["content"] + self._tail]

    def example(self, messages: Messages) -> str:
        """The pieces as one text."""
        return "".join(self.pieces(messages))

    def prompts_digest(self) -> str:
        """sha256 of the tokens of prompts: the same for models that are asked for answers alike."""
        ids = [self._tokenizer.encode(self.prompt(talk), add_special_tokens=False).ids for talk in PROBES]
        return sha256_bytes(canonical_json(ids))

    def said(self, messages: Messages, text: str, ids: numpy.ndarray) -> numpy.ndarray:
        """Of the tokens `ids` [n] of a conversation's `text`, those that an assistant said, ends of turns included.

        Raises:
            UnclearError: if that can't be told.
        """
        import numpy

        if all(message["role"] != ASSISTANT for message in messages):
            return numpy.zeros(len(ids), dtype=bool)
        if self._marks and self._thinking is None:
            return self._marked(messages, ids)
        found, sure = self.quickly([messages], ids, numpy.array([0, len(ids)]))
        return found if sure[0] else self._asked(messages, text, ids)

    def quickly(
        self, talks: Sequence[Messages], ids: numpy.ndarray, bounds: numpy.ndarray
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """What `Turns.said` finds, as far as it is sure; nothing of templates that have to be asked."""
        import numpy

        if self._turns is None:
            return numpy.zeros(len(ids), dtype=bool), numpy.zeros(len(talks), dtype=bool)
        return self._turns.said([self._answered(talk) for talk in talks], ids, bounds)

    def _rendered(self, messages: Messages, prompt: bool) -> str:
        try:
            if self._compiled is not None and messages and all(map(_is_plain, messages)):
                return self._compiled(messages=list(messages), add_generation_prompt=prompt)
            return self._applied(messages, prompt)
        except Exception as error:  # templates raise what they like
            roles = ", ".join(message["role"] for message in messages)
            raise StageError(f"the chat template refuses a conversation of {roles}: {error}") from None

    def _applied(self, messages: Messages, prompt: bool) -> str:
        plain = [dict(message) for message in messages]
        return self._templated.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=prompt, **self._switches
        )

    @functools.cached_property
    def _compiled(self) -> Callable[..., str] | None:
        """`render` of the template as transformers compiles it, with what `apply_chat_template` gives it.

        That function takes as long to look for tools, images and tensors in what it is given as the template takes to
        write, and nothing but text comes here. None where transformers has no such compiler, or the two differ.
        """
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            template: Any = _compile_jinja_template(self._templated.get_chat_template())
            given = {"tools": None, "documents": None, **self._templated.special_tokens_map, **self._switches}
            render = functools.partial(template.render, **given)
            same = all(
                render(messages=list(talk), add_generation_prompt=prompt) == self._applied(talk, prompt)
                for talk, prompt in itertools.product(PROBES, (True, False))
            )
        except Exception:  # a part of transformers that may change, or a template that refuses the probes
            return None
        return render if same else None

    @functools.cached_property
    def end(self) -> int | None:
        """The special token that the template writes right behind an answer; None if it writes none there."""
        try:
            tail = self._tail.lstrip()
        except StageError:
            return None
        found = [token for token in self._special if tail.startswith(token)]
        return self._tokenizer.token_to_id(max(found, key=len)) if found else None

    @functools.cached_property
    def _tail(self) -> str:
        """What the template writes behind the last answer."""
        content = "Zubra"
        whole = self._rendered([{"role": "user", "content": "Why?"}, {"role": ASSISTANT, "content": content}], False)
        _, met, tail = whole.rpartition(content)
        if not met:
            raise StageError("the chat template doesn't write an answer as it stands")
        return tail

    def _answered(self, messages: Messages) -> Messages:
        """The conversation with its last answer as it is written: with its thought where thinking is on."""
        if self._thinking is None or not messages or messages[-1]["role"] != ASSISTANT:
            return messages
        last = messages[-1]
        opened, closed = THOUGHT
        thought, _, answer = last["content"].rpartition(closed)
        thought = last.get("reasoning_content", "") or thought.strip().removeprefix(opened)
        answer = answer.strip("\n")
        if self._thinking and thought.strip():
            answer = f"{opened}\n{thought.strip()}\n{closed}\n\n{answer}"
        return [*messages[:-1], {"role": ASSISTANT, "content": answer}]

    def _asked(self, messages: Messages, text: str, ids: numpy.ndarray) -> numpy.ndarray:
        """`said` by the prefixes that the template writes."""
        import numpy

        found = numpy.zeros(len(ids), dtype=bool)
        borders = self._borders(messages, text)
        pieces = self._tokenizer.encode_batch_fast([text[:border] for border in borders], add_special_tokens=False)
        for piece in pieces:
            if ids[: len(piece.ids)].tolist() != piece.ids:
                raise UnclearError("an answer begins or ends inside a token")
        for begin, end in zip(pieces[::2], pieces[1::2], strict=True):
            found[len(begin.ids) : len(end.ids)] = True
        return found

    def _marked(self, messages: Messages, ids: numpy.ndarray) -> numpy.ndarray:
        import numpy

        plain = [dict(message) for message in messages]
        known = self._templated.apply_chat_template(
            plain, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if list(known["input_ids"]) != ids.tolist():
            raise UnclearError("transformers cuts the text into other tokens")
        return numpy.array(known["assistant_masks"], dtype=bool)

    def _borders(self, messages: Messages, text: str) -> list[int]:
        """Where answers begin and end in `text`, in turns."""
        borders: list[int] = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            try:
                begin, whole = self.prompt(messages[:number]), self.example(messages[: number + 1])
            except StageError as error:
                raise UnclearError(f"of a beginning of the conversation, {error}") from None
            if not text.startswith(begin) or not whole.startswith(begin):
                raise UnclearError("the chat template writes an answer's beginning otherwise when it prompts for one")
            said, content = self._trimmed(whole[len(begin) :]), message["content"].strip()
            closing = next((token for token in self._special if said.endswith(token)), "")
            place = said.rfind(content, 0, len(said) - len(closing)) if content else -1
            if not text.startswith(said, len(begin)) and place >= 0:
                # Some put more before the last answer than before earlier ones, such as an empty thought.
                said = said[place:]
            if not text.startswith(said, len(begin)):
                raise UnclearError("the chat template writes an answer otherwise once others follow")
            borders += [len(begin), len(begin) + len(said)]
        return borders

    def _trimmed(self, said: str) -> str:
        """Without the space behind the token that ends the turn, where there is such a token."""
        bare = said.rstrip()
        return bare if bare.endswith(self._special) else said


def _is_plain(message: Mapping[str, str]) -> bool:
    """Whether it is a role and text."""
    return len(message) == 2 and type(message.get("role")) is str and type(message.get("content")) is str


def thinking_of(config: Mapping[str, Any]) -> tuple[bool | None, ...]:
    """What `thinking` of a data entry tells templates: one thing, or two that conversations take turns in."""
    return {None: (None,), "off": (False,), "on": (True,), "both": (False, True)}[config.get("thinking")]
