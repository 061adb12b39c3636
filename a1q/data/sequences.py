"""Documents of one split, and token sequences of fixed length made from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.data.reading import Reader, Tokenized, Told, mixed, side
from a1q.errors import MismatchError, Problem, StageError

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer


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
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Identity of what asks for answers, `a1q.data.chat.Chat.prompts_digest`, by thinking: `on`, `off`, `default`."""

    @property
    def borders(self) -> numpy.ndarray | None:
        """`starts` where attention is to stay within a document, else None; see `a1q.models.positions.passed`."""
        return self.starts if self.separate else None


def documents(config: Mapping[str, Any], split: str) -> Iterator[str]:
    """The documents of one side, in the source's order. A conversation is its contents, one paragraph a message.

    Args:
        config: a data entry: `source`, optionally `format`, `column`, `holdout`, `revision`; or `parts`, of a mix.
        split: `train`, `tune` or `test`.

    Raises:
        StageError: if the source can't be read.
        MismatchError: if there is no such source, or the Hub can't be reached.
    """
    for record in side(config, split):
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

    Memory holds the tokens asked for, and of the documents at most `a1q.data.spool.HELD` characters and
    some bytes each.

    Args:
        config: a data entry; `attention` None separates documents where a conversation is among them.
        tokenizer_folder: a model's folder with tokenizer.json; conversations also need its chat template.
        count: how many sequences; None for all there are, of a mix until one of its parts is used up.
        seed: of the order; the sequences for a smaller count are the first of those for a larger one.
        marks: find out which tokens an assistant said (`a1q.data.chat`).

    Raises:
        StageError: if the text is not long enough; the message says for how many sequences it is.
        MismatchError: if the tokenizer has no end-of-text token, or no chat template for conversations.
    """
    tokenizer, end = load_tokenizer(tokenizer_folder)
    told = Told()
    parts = config.get("parts") or [{"weight": 1.0, "entry": config}]
    seeds = [f"{seed}/{split}" if number == 0 else f"{seed}/{split}/{number}" for number in range(len(parts))]
    with ExitStack() as stack:
        readers = [
            stack.enter_context(Reader(part["entry"], tokenizer_folder, tokenizer, end, split, one, marks, told))
            for part, one in zip(parts, seeds, strict=True)
        ]
        wanted = None if count is None else count * seq_len
        documents, last = _taken(readers, [part["weight"] for part in parts], wanted)
    return _cut(config, documents, split, seq_len, count, told, last)


def _taken(readers: Sequence[Reader], weights: Sequence[float], wanted: int | None) -> tuple[list[Tokenized], int]:
    """Documents of at least `wanted` tokens if there are so many, and the number of the reader that has none left."""
    found: list[Tokenized] = []
    given, size = [0] * len(readers), 0
    for number, document in mixed(readers, weights):
        found.append(document)
        given[number] += 1
        size += len(document.ids)
        if wanted is not None and size >= wanted:
            break
    return found, next((number for number, reader in enumerate(readers) if given[number] == len(reader)), 0)


def _cut(
    config: Mapping[str, Any],
    documents: Sequence[Tokenized],
    split: str,
    seq_len: int,
    count: int | None,
    told: Told,
    last: int,
) -> Sequences:
    import numpy

    size = sum(len(document.ids) for document in documents)
    rows = size // seq_len if count is None else count
    if rows * seq_len > size or rows == 0:
        parts = config.get("parts")
        used_up = f"`{parts[last]['name']}` is used up first; " if parts else ""
        raise StageError(
            f"the {split} side of {config.get('source') or 'the mix'} has text for {size // seq_len} sequences of "
            f"{seq_len} tokens, and {'at least 1' if count is None else count} were asked for; "
            f"{used_up}ask for fewer or shorter ones, or name more text"
        )

    def blocks(flat: numpy.ndarray) -> numpy.ndarray:
        return flat[: rows * seq_len].reshape(rows, seq_len)

    begins = numpy.zeros(size, dtype=bool)
    begins[numpy.cumsum([0, *(len(document.ids) for document in documents[:-1])])] = True
    asked = config.get("attention")
    return Sequences(
        tokens=blocks(numpy.concatenate([document.ids for document in documents])),
        starts=blocks(begins),
        templated=told.templated,
        said=blocks(numpy.concatenate([document.said for document in documents])) if told.clear else None,
        unclear=told.unclear,
        reason=told.reason,
        separate=told.templated if asked is None else asked == "document",
        prompts=told.prompts,
    )


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
