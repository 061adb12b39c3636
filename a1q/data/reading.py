"""One side's documents as tokens, in an order drawn from a seed: of one entry, or of a mix by weight."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.data.chat import Chat, UnclearError, thinking_of
from a1q.data.records import Record, records
from a1q.data.split import SPLITS, side_of
from a1q.data.spool import Spool

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer

DEFAULT_HOLDOUT = 0.05
BATCH = 512
"""Documents encoded at once."""


@dataclass
class Told:
    """What was found out while documents became tokens."""

    templated: bool = False
    """Whether a conversation was among them."""
    clear: int = 0
    """Conversations of which it can be told what an assistant said."""
    unclear: int = 0
    """Those of which it can't."""
    reason: str = ""
    """Why, of the first of them."""
    prompts: dict[str, str] = field(default_factory=dict)
    """`Chat.prompts_digest` by what the template was told about thinking: `on`, `off` or `default`."""


@dataclass(frozen=True)
class Tokenized:
    """A document."""

    ids: numpy.ndarray
    """int32 [n], the end-of-text token included."""
    said: numpy.ndarray | None
    """bool [n], what an assistant said; None where nobody asked."""


def side(config: Mapping[str, Any], split: str) -> Iterator[Record]:
    """The records of one side, in the source's order; of a mix, part by part, each split by its own `holdout`."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if config.get("parts"):
        return (record for part in config["parts"] for record in side(part["entry"], split))
    holdout = config.get("holdout", DEFAULT_HOLDOUT)
    return (record for record in records(config) if side_of(record.place, holdout) == split)


class Reader:
    """Documents of one side as tokens; iterating twice gives the same again.

    Texts are made by this thread while another lets the tokenizer, which uses all cores, work on those before.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        tokenizer: Tokenizer,
        end: int,
        split: str,
        seed: str,
        marks: bool,
        told: Told,
    ):
        """Read through the entry; `folder` is a model's, `end` its end-of-text token, `seed` of the order."""
        self._folder, self._tokenizer, self._end, self._marks, self._told = folder, tokenizer, end, marks, told
        self._modes = thinking_of(config)
        self._chats: dict[bool | None, Chat] = {}
        self._spool = Spool(side(config, split))
        self._order = array("Q", range(len(self._spool)))
        random.Random(seed).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._spool)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.__exit__(None, None, None)

    def __iter__(self) -> Iterator[Tokenized]:
        with ThreadPoolExecutor(1) as thread:
            pending: tuple[list[Record], list[list[str]], Any] | None = None
            for start in range(0, len(self._order), BATCH):
                picked = [self._spool[number] for number in self._order[start : start + BATCH]]
                texts = [self._pieces(record) for record in picked]
                flat = [piece for pieces in texts for piece in pieces]
                coming = thread.submit(self._tokenizer.encode_batch_fast, flat, add_special_tokens=False)
                if pending is not None:
                    yield from self._tokenized(*pending)
                pending = picked, texts, coming
            if pending is not None:
                yield from self._tokenized(*pending)

    def _tokenized(self, picked: Sequence[Record], texts: Sequence[list[str]], coming: Any) -> Iterator[Tokenized]:
        import numpy

        found, bounds = array("i"), [0]
        encodings = iter(coming.result())
        for pieces in texts:
            for _ in pieces:
                found.fromlist(next(encodings).ids)
            found.append(self._end)
            bounds.append(len(found))
        ids = numpy.frombuffer(found, dtype=numpy.intc)
        said = self._said(picked, texts, ids, numpy.array(bounds)) if self._marks else None
        for number, record in enumerate(picked):
            self._told.templated = self._told.templated or bool(record.messages)
            own = slice(bounds[number], bounds[number + 1])
            yield Tokenized(ids[own], None if said is None else said[own])

    def _pieces(self, record: Record) -> list[str]:
        return self._chat(record).pieces(record.messages) if record.messages else [record.text]

    def _said(
        self, picked: Sequence[Record], texts: Sequence[list[str]], ids: numpy.ndarray, bounds: numpy.ndarray
    ) -> numpy.ndarray:
        """bool [n] of a batch's tokens; what one look doesn't find of a conversation is asked of its template."""
        import numpy

        marks = numpy.zeros(len(ids), dtype=bool)
        sure = numpy.zeros(len(picked), dtype=bool)
        for mode, chat in self._chats.items():
            own = [record.messages if record.messages and self._mode(record) == mode else () for record in picked]
            found, known = chat.quickly(own, ids, bounds)
            known &= [bool(messages) for messages in own]
            marks |= found & numpy.repeat(known, numpy.diff(bounds))
            sure |= known
        for number, record in enumerate(picked):
            if record.messages and not sure[number]:
                place = slice(bounds[number], bounds[number + 1] - 1)
                try:
                    marks[place] = self._chat(record).said(record.messages, "".join(texts[number]), ids[place])
                except UnclearError as error:
                    self._told.unclear += 1
                    self._told.reason = self._told.reason or str(error)
                else:
                    sure[number] = True
        self._told.clear += int(sure.sum())
        return marks

    def _mode(self, record: Record) -> bool | None:
        return self._modes[int(record.place * (1 << 40)) % len(self._modes)]

    def _chat(self, record: Record) -> Chat:
        """The template as this conversation takes it; transformers is imported when the first one comes."""
        mode = self._mode(record)
        if mode not in self._chats:
            chat = self._chats[mode] = Chat(self._folder, self._tokenizer, mode)
            name = "default" if mode is None else "on" if mode else "off"
            self._told.prompts[name] = chat.prompts_digest()
        return self._chats[mode]


def mixed(readers: Sequence[Reader], weights: Sequence[float]) -> Iterator[tuple[int, Tokenized]]:
    """(number of the reader, document), so that each has about its weight's share of the tokens at any time.

    It ends where the reader whose turn it is has no document left.
    """
    given = [0.0] * len(readers)
    with ExitStack() as stack:
        flows = [iter(reader) for reader in readers]
        for flow in flows:
            stack.callback(flow.close)  # type: ignore[attr-defined]
        while True:
            number = min(range(len(readers)), key=lambda index: (given[index] / weights[index], index))
            document = next(flows[number], None)
            if document is None:
                return
            given[number] += len(document.ids)
            yield number, document
