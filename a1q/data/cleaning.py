"""From docstrings to plain English: markup off, tables and code out, what was said before left out."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence

FENCE = re.compile(r"^( *)(```|~~~).*?^ *\2 *$", re.MULTILINE | re.DOTALL)
RULE_OR_TABLE = re.compile(r"^\s*(?:[-=~^*#`_+.\"']{3,}[-=~^*#`_+.\"'\s]*|[|+].*[|+]|</?\w[^>]*>|\{\{?\w+\}?\})\s*$")
DIRECTIVE = re.compile(r"^\s*(?:\.\. (?:[\w:-]+::|_).*|:\w+:\s*\S*|@\w+.*)$")
REPLACEMENTS = (
    (re.compile(r"(?<![\w`]):[a-zA-Z:+-]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"`\1`"),  # :class:`~a.B` of Sphinx
    (re.compile(r"\[`~?([^`\]]+)`\](?:\([^)\s]*\))?"), r"`\1`"),  # [`~a.B`] of Hugging Face
    (re.compile(r"\[([^\]\n]+)\]\(https?://[^)\s]*\)"), r"\1"),
    (re.compile(r"``([^`\n]+)``"), r"`\1`"),
    (re.compile(r"^( *):(?:param|parameter|arg)(?: [\w\[\], |.]+)? ([*\w]+):", re.MULTILINE), r"\1\2:"),
    (re.compile(r"^( *):(?:returns?|rtype):", re.MULTILINE), r"\1Returns:"),
    (re.compile(r"^( *):raises? (\w+):", re.MULTILINE), r"\1Raises \2:"),
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("[\u201c\u201d]"), '"'),
    (re.compile("[\u2013\u2014]"), "-"),
    (re.compile("\u2026"), "..."),
    (re.compile("\u00a0|\t"), " "),
    (re.compile(r"(?<=[^\s.])::$", re.MULTILINE), ":"),
)
PLAIN_WORD = re.compile(r"[(\"'`*]*[A-Za-z][A-Za-z'/-]*[`)\"'*.,:;!?]*")
WORD = re.compile(r"[a-z0-9_]+")
EXAMPLES, EXAMPLE_LINES = 1, 6
"""How many doctest blocks a document keeps, and how long the longest may be."""
SHINGLE, SEEN_SHARE = 6, 0.5
"""A paragraph counts as said before when this share of its word 6-grams was."""


def clean(text: str) -> list[str]:
    """The paragraphs worth reading, without markup; indentation is kept."""
    text = FENCE.sub("", text)
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    lines = ["" if DIRECTIVE.match(line) else line.rstrip() for line in text.splitlines()]
    text = "\n".join(line for line in lines if not line or not RULE_OR_TABLE.match(line))
    kept: list[str] = []
    examples = 0
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip("\n")
        if paragraph.lstrip().startswith(">>>"):
            examples += 1
            if examples <= EXAMPLES and paragraph.count("\n") < EXAMPLE_LINES and kept:
                kept.append(paragraph)
        elif is_prose(paragraph):
            kept.append(paragraph)
    while kept and len(kept[-1].split()) < 3:  # a heading whose section is gone
        kept.pop()
    return kept


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is mostly plain English words, in plain letters."""
    words = paragraph.split()
    if not words or "::=" in paragraph:
        return False
    plain = sum(1 for word in words if PLAIN_WORD.fullmatch(word))
    letters = sum(1 for letter in paragraph if letter.isascii() and letter.isalpha())
    solid = sum(map(len, words))
    return plain >= 0.6 * len(words) and letters >= 0.72 * solid


class Novelty:
    """Takes documents one after the other and gives back what earlier ones did not say.

    Near-duplicates are found by containment: a paragraph is dropped when at least half of its word 6-grams occurred
    in earlier documents, kept or not. Fed in the order of the split (test, tune, train), it leaves nothing in train
    that is close to what is held out.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def filter(self, paragraphs: Sequence[str]) -> list[str]:
        """The new paragraphs of a document; none if more than half of the document was said before."""
        kept, own, size = [], set(), 0
        for paragraph in paragraphs:
            shingles = shingles_of(paragraph)
            own |= shingles
            size += len(paragraph)
            if not shingles or len(shingles & self.seen) < SEEN_SHARE * len(shingles):
                kept.append(paragraph)
        self.seen |= own
        return kept if 2 * sum(map(len, kept)) >= size else []


def shingles_of(text: str) -> set[int]:
    """Hashes of the word 6-grams of `text`; a shorter text of at least 3 words counts as one."""
    words = [_word_hash(word) for word in WORD.findall(text.lower())]
    if len(words) < 3:
        return set()
    size = min(SHINGLE, len(words))
    found = set()
    for start in range(len(words) - size + 1):
        value = size
        for word in words[start : start + size]:
            value = (value * 1_000_003 + word) & 0x1FFFFFFFFFFFFFFF
        found.add(value)
    return found


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return zlib.crc32(word.encode())
