"""Documents of one split, and token sequences of fixed length made from them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.data.chat import Chat, UnclearError
from a1q.data.records import Record, records
from a1q.data.split import SPLITS, side_of
from a1q.errors import MismatchError, Problem, StageError

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer

DEFAULT_HOLDOUT = 0.05
BATCH = 512
"""Documents encoded at once."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one side, and what they were cut from."""

    tokens: numpy.ndarray
    """int32 [n, seq_len]."""
    starts: numpy.ndarray
    """bool [n, seq_len], True where a document begins. A sequence's first token may be in the middle of one."""
    templated: bool
    """Whether conversations among them went through the tokenizer's chat template."""
    said: numpy.ndarray | None = None
    """bool [n, seq_len], True for what an assistant said; None where nobody asked, or it can't be told of any
    conversation."""
    unclear: int = 0
    """Conversations among them of which it can't be told; no token of theirs is marked."""
    reason: str = ""
    """Why, of the first of them."""
    separate: bool = False
    """Whether attention is to stay within a document (option `attention` of the data entry)."""

    @property
    def borders(self) -> numpy.ndarray | None:
        """`starts` where attention is to stay within a document, else None; see `a1q.models.positions.passed`."""
        return self.starts if self.separate else None


def documents(config: Mapping[str, Any], split: str) -> Iterator[str]:
    """The documents of one side, in the source's order. A conversation is its contents, one paragraph a message.

    Args:
        config: a data entry: `source`, optionally `format`, `column`, `holdout`, `revision`.
        split: `train`, `tune` or `test`.

    Raises:
        StageError: if the source can't be read.
        MismatchError: if there is no such source, or the Hub can't be reached.
    """
    for record in _side(config, split):
        yield record.text or "\n\n".join(message["content"] for message in record.messages)


def token_sequences(
    config: Mapping[str, Any], tokenizer_folder: Path, split: str, seq_len: int, count: int | None, seed: int
) -> numpy.ndarray:
    """The tokens, int32 [count, seq_len], of `read_sequences`, whose arguments and errors it has."""
    return read_sequences(config, tokenizer_folder, split, seq_len, count, seed).tokens


def read_sequences(
    config: Mapping[str, Any],
    tokenizer_folder: Path,
    split: str,
    seq_len: int,
    count: int | None,
    seed: int,
    marks: bool = False,
) -> Sequences:
    """Token sequences of one side: documents shuffled by `seed`, joined by the end-of-text token, cut in blocks.

    Args:
        config: a data entry; `attention` None separates documents where a conversation is among them.
        tokenizer_folder: a model's folder with tokenizer.json; conversations also need its chat template.
        count: how many sequences; None for all there are.
        seed: of the order; the sequences for a smaller count are the first of those for a larger one.
        marks: find out which tokens an assistant said (`a1q.data.chat`).

    Raises:
        StageError: if the text is not long enough; the message says for how many sequences it is.
        MismatchError: if the tokenizer has no end-of-text token, or no chat template for conversations.
    """
    import numpy

    tokenizer, end = load_tokenizer(tokenizer_folder)
    found = list(_side(config, split))
    random.Random(f"{seed}/{split}").shuffle(found)
    chats = _Chats(tokenizer_folder, tokenizer)
    wanted = None if count is None else count * seq_len
    parts: list[numpy.ndarray] = []
    said: list[numpy.ndarray] = []
    size, templated = 0, False
    for start in range(0, len(found), BATCH):
        picked = found[start : start + BATCH]
        templated = templated or any(record.messages for record in picked)
        texts = [chats.text(record) for record in picked]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for record, text, encoding in zip(picked, texts, encodings, strict=True):
            parts.append(numpy.array([*encoding.ids, end], dtype=numpy.int32))
            if marks:
                said.append(numpy.array([*chats.said(record, text, encoding.ids), False]))
            size += len(parts[-1])
        if wanted is not None and size >= wanted:
            break
    rows = size // seq_len if count is None else count
    if rows * seq_len > size or rows == 0:
        raise StageError(
            f"the {split} side of {config['source']} has text for {size // seq_len} sequences of {seq_len} tokens, "
            f"and {'at least 1' if count is None else count} were asked for; "
            "ask for fewer or shorter ones, or name more text"
        )
    begins = numpy.zeros(size, dtype=bool)
    begins[numpy.cumsum([0, *map(len, parts[:-1])])] = True
    tokens, starts = (flat[: rows * seq_len].reshape(rows, seq_len) for flat in (numpy.concatenate(parts), begins))
    asked = config.get("attention")
    separate = templated if asked is None else asked == "document"
    known = numpy.concatenate(said)[: rows * seq_len].reshape(rows, seq_len) if chats.clear else None
    return Sequences(tokens, starts, templated, known, chats.unclear, chats.reason, separate)


def load_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer of a model's folder and the id of its end-of-text token.

    Raises:
        MismatchError: if there is no tokenizer.json, or it has no end-of-text token.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise MismatchError([Problem(f"{folder} has no tokenizer.json", hint="a1q needs the fast tokenizer's file")])
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library knows no narrower one
        raise MismatchError([Problem(f"{path} is no tokenizer: {error}")]) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = _end_of_text(folder, tokenizer)
    if end is None:
        raise MismatchError([Problem(f"the tokenizer in {folder} names no end-of-text token (eos_token)")])
    return tokenizer, end


def _end_of_text(folder: Path, tokenizer: Tokenizer) -> int | None:
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(token, Mapping):
        token = token.get("content")
    if token and tokenizer.token_to_id(token) is not None:
        return tokenizer.token_to_id(token)
    number = _read_json(folder / "config.json").get("eos_token_id")
    if isinstance(number, Sequence):
        number = next(iter(number), None)
    return number if isinstance(number, int) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MismatchError([Problem(f"{path} is not JSON: {error}")]) from None
    if not isinstance(found, dict):
        raise MismatchError([Problem(f"{path} is no JSON object")])
    return found


def _side(config: Mapping[str, Any], split: str) -> Iterator[Record]:
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    holdout = config.get("holdout", DEFAULT_HOLDOUT)
    return (record for record in records(config) if side_of(record.place, holdout) == split)


class _Chats:
    """How a record becomes the text to encode; transformers is imported when the first conversation comes."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self._folder, self._tokenizer = folder, tokenizer
        self._chat: Chat | None = None
        self.clear = self.unclear = 0
        """Conversations of which it can be told what an assistant said, and others."""
        self.reason = ""

    def text(self, record: Record) -> str:
        if not record.messages:
            return record.text
        if self._chat is None:
            self._chat = Chat(self._folder, self._tokenizer)
        return self._chat.text(record.messages)

    def said(self, record: Record, text: str, ids: Sequence[int]) -> list[bool]:
        if record.messages and self._chat is not None:
            try:
                found = self._chat.said(record.messages, text, ids)
            except UnclearError as error:
                self.unclear += 1
                self.reason = self.reason or str(error)
            else:
                self.clear += 1
                return found
        return [False] * len(ids)
