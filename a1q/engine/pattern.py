"""Match module names with regexes from a recipe, in bounded time.

`re` backtracks: a short pattern such as `(a+)+b` can take longer than a lifetime on a 40-character name. A recipe may
come from anyone, so its patterns are matched here by following *sets of positions* instead: from every position where
a part of the pattern may start, collect every position where it may end. Each set holds at most one entry per
character, so no pattern can take exponential time. The grammar is Python's own, parsed by `re`; what no set of
positions can express (backreferences, lookbehind, atomic groups) or a module name never needs (flags, `\\b`) is
refused. The result always equals `re.fullmatch`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Set
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 1000
MAX_DEPTH = 3
"""Each repeat or lookahead inside another costs a factor of the name's length; more serve no module name."""

Positions = Set[int]
Node = Callable[[str, Positions], Positions]
"""Maps the positions of a text where a part may start to those where it may end."""

_CATEGORIES = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
}
_NEGATED_CATEGORIES = {
    op.CATEGORY_NOT_DIGIT: op.CATEGORY_DIGIT,
    op.CATEGORY_NOT_SPACE: op.CATEGORY_SPACE,
    op.CATEGORY_NOT_WORD: op.CATEGORY_WORD,
}
_STARTS = (op.AT_BEGINNING, op.AT_BEGINNING_STRING)


class Pattern:
    """A compiled pattern; `fullmatch(name)` takes time polynomial in the name's length."""

    def __init__(self, text: str, node: Node):
        self.text = text
        self._node = node

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of `name` matches, as `re.fullmatch` would say."""
        return len(name) in self._node(name, {0})


@functools.lru_cache(maxsize=256)
def compile_pattern(text: str) -> Pattern:
    """Compile a regex for `Pattern.fullmatch`.

    Raises:
        ValueError: if it is no regex, or uses what can't be matched in bounded time; the message says which.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the pattern has {len(text)} characters; at most {MAX_LENGTH} are allowed")
    try:
        tree = parser.parse(text)
        if tree.state.flags & ~re.UNICODE:
            raise ValueError("flags such as (?i) are not supported")
        return Pattern(text, _sequence(tree, 0))
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    except (OverflowError, RecursionError):
        raise ValueError("not a usable regular expression: too large or too deeply nested") from None


def _sequence(tree: Any, depth: int) -> Node:
    nodes = [_node(kind, value, depth) for kind, value in tree]

    def follow(text: str, starts: Positions) -> Positions:
        for node in nodes:
            if not starts:
                break
            starts = node(text, starts)
        return starts

    return follow


def _node(kind: Any, value: Any, depth: int) -> Node:
    if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.CATEGORY):
        return _one_character(_test(kind, value))
    if kind is op.BRANCH:
        branches = [_sequence(branch, depth) for branch in value[1]]
        return lambda text, starts: frozenset().union(*(branch(text, starts) for branch in branches))
    if kind is op.SUBPATTERN:
        _, add_flags, remove_flags, body = value
        if add_flags or remove_flags:
            raise ValueError("flags such as (?i:...) are not supported")
        return _sequence(body, depth)
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
        low, high, body = value
        return _repeat(_sequence(body, _deeper(depth)), low, high)
    if kind in (op.ASSERT, op.ASSERT_NOT) and value[0] > 0:
        ahead, wanted = _sequence(value[1], _deeper(depth)), kind is op.ASSERT
        return lambda text, starts: {start for start in starts if bool(ahead(text, {start})) is wanted}
    if kind is op.AT and value in _STARTS:
        return lambda text, starts: starts & {0}
    if kind is op.AT and value in (op.AT_END, op.AT_END_STRING):
        # `$` also matches before a final newline, which no full match can end on
        return lambda text, starts: starts & {len(text)}
    if kind is op.FAILURE:
        return lambda text, starts: set()
    name = "word boundaries" if kind is op.AT else str(kind).lower().replace("_", " ")
    raise ValueError(f"{name} can't be matched in bounded time: use plain repeats, classes, alternatives and lookahead")


def _deeper(depth: int) -> int:
    if depth == MAX_DEPTH:
        raise ValueError(f"repeats are nested more than {MAX_DEPTH} deep: that could take forever to match")
    return depth + 1


def _one_character(test: Callable[[str], bool]) -> Node:
    return lambda text, starts: {start + 1 for start in starts if start < len(text) and test(text[start])}


def _test(kind: Any, value: Any) -> Callable[[str], bool]:
    """Whether one character belongs to a literal, a class or a category."""
    if kind is op.LITERAL:
        return lambda char: ord(char) == value
    if kind is op.NOT_LITERAL:
        return lambda char: ord(char) != value
    if kind is op.ANY:
        return lambda char: char != "\n"
    if kind is op.RANGE:
        low, high = value
        return lambda char: low <= ord(char) <= high
    if kind is op.CATEGORY:
        if value in _NEGATED_CATEGORIES:
            member = _CATEGORIES[_NEGATED_CATEGORIES[value]]
            return lambda char: not member(char)
        return _CATEGORIES[value]
    negated = value[0][0] is op.NEGATE
    tests = [_test(*item) for item in value[negated:]]
    return lambda char: any(test(char) for test in tests) is not negated


def _repeat(body: Node, low: int, high: int) -> Node:
    def follow(text: str, starts: Positions) -> Positions:
        for _ in range(low):
            ends = body(text, starts)
            if ends == starts:  # stable (or empty): every further round gives the same
                break
            starts = ends
        reached = set(starts)
        frontier = starts
        for _ in range(min(high - low, len(text) + 1)):
            frontier = body(text, frontier) - reached
            if not frontier:
                break
            reached |= frontier
        return reached

    return follow
