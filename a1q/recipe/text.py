"""YAML text -> a tree of nodes, each knowing its place.

The dialect is YAML 1.2's core schema: `1e-5` is a number, `true` and `false` are the only booleans, and `yes`, `no`,
`on` and `off` are text. What a recipe never needs and what has surprised people is refused: duplicate keys, keys that
are not text, merge keys (`<<`), tags, NaN and infinity, several documents. Aliases are allowed, but the tree they
unfold to is bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from a1q.errors import Problem, RecipeError

MAX_BYTES = 128 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 50
MAX_PROBLEMS = 50
"""More problems than these are counted, not shown."""


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or `--set PATH=VALUE` (line 0)."""

    file: str
    line: int = 0
    column: int = 0


@dataclass
class Node:
    """A value with its place; containers hold nodes."""

    value: dict[str, Node] | list[Node] | str | int | float | bool | None
    place: Place
    key_place: Place | None = None
    """Place of the key, for a value inside a mapping."""

    @property
    def entries(self) -> dict[str, Node]:
        """The entries of a mapping; none for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    def plain(self) -> Any:
        """The value without places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    """PyYAML's reader with YAML 1.2's rules for plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own protocol)


_RULES = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", tuple("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        tuple("-+.0123456789"),
    ),
    ("merge", r"<<", ("<",)),
)
for _name, _regex, _first in _RULES:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_regex})\Z"), list(_first))


def parse_recipe(data: bytes, file: str) -> Node:
    """Parse a recipe's bytes; the result is a mapping.

    Raises:
        RecipeError: with every duplicate key and refused value at its place, or with the one place where the text
            stops being YAML.
    """
    node = _parse(data, file, None)
    if not isinstance(node.value, dict):
        raise RecipeError([_problem(node.place, f"a recipe is a mapping of keys, not {kind_of(node.plain())}")])
    return node


def parse_value(text: str, origin: str) -> Node:
    """Parse the value of `--set PATH=VALUE`; every place says `origin`.

    Raises:
        RecipeError: as `parse_recipe`.
    """
    if not text.strip():
        return Node(None, Place(origin))
    return _parse(text.encode("utf-8", "surrogateescape"), origin, Place(origin))


def shortened(problems: list[Problem]) -> list[Problem]:
    """The first problems, as many as anyone reads, and one that counts the rest."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = Problem(f"and {len(problems) - MAX_PROBLEMS} more problems", file=problems[0].file)
    return [*problems[:MAX_PROBLEMS], more]


def kind_of(value: Any) -> str:
    """What a plain value is, in a user's words and with the value itself: `text 'abc'`, `a list`, `nothing`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"text {value[:40] + '...' if len(value) > 40 else value!r}"
    return "a mapping" if isinstance(value, dict) else "a list"


def _parse(data: bytes, file: str, fixed: Place | None) -> Node:
    text = _decode(data, file)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        place = _place_at(file, text, error.position)
        raise RecipeError([_problem(place, f"character {error.character!r} is not allowed in YAML")]) from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError([_syntax_problem(error, file, text)]) from None
    except RecursionError:
        raise RecipeError([_problem(Place(file, 1, 1), f"nested more than {MAX_DEPTH} levels deep")]) from None
    if root is None:
        raise RecipeError([_problem(fixed or Place(file, 1, 1), "the file is empty")])
    builder = _Builder(file, fixed)
    node = builder.build(root, 0)
    if builder.problems:
        raise RecipeError(shortened(builder.problems))
    return node


def _decode(data: bytes, file: str) -> str:
    if len(data) > MAX_BYTES:
        raise RecipeError([_problem(Place(file), f"a recipe has at most {MAX_BYTES} bytes, and this file more")])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        place = _place_at(file, before, len(before))
        raise RecipeError([_problem(place, f"not a text file: byte 0x{data[error.start]:02x} is not UTF-8")]) from None


class _Builder:
    """Turns PyYAML's nodes into ours, bounded, collecting problems."""

    def __init__(self, file: str, fixed: Place | None):
        self.file = file
        self.fixed = fixed
        self.count = 0
        self.problems: list[Problem] = []

    def place(self, node: yaml.Node) -> Place:
        return self.fixed or Place(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def build(self, node: yaml.Node, depth: int) -> Node:
        place = self.place(node)
        self.count += 1
        if self.count > MAX_NODES:
            raise RecipeError([_problem(place, f"aliases unfold to more than {MAX_NODES} values")])
        if depth > MAX_DEPTH:
            raise RecipeError([_problem(place, f"nested more than {MAX_DEPTH} levels deep")])
        if isinstance(node, yaml.MappingNode):
            return Node(dict(self.entries(node, depth)), place)
        if isinstance(node, yaml.SequenceNode):
            self.check_tag(node, "seq")
            return Node([self.build(item, depth + 1) for item in node.value], place)
        assert isinstance(node, yaml.ScalarNode)
        try:
            return Node(self.scalar(node), place)
        except ValueError as error:
            self.problems.append(_problem(place, str(error)))
            return Node(None, place)

    def entries(self, node: yaml.MappingNode, depth: int) -> Iterator[tuple[str, Node]]:
        self.check_tag(node, "map")
        seen: dict[str, Place] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            if key_node.tag.endswith(":merge"):
                self.problems.append(_problem(place, "merge keys (<<) are not supported", "repeat the keys, or `use:`"))
                continue
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                hint = f"write it in quotes: '{key_node.value}'" if isinstance(key_node, yaml.ScalarNode) else ""
                self.problems.append(_problem(place, "a key must be text", hint))
                continue
            key = key_node.value
            if key in seen:
                self.problems.append(_problem(place, f"duplicate key {key!r}", f"first at line {seen[key].line}"))
                continue
            seen[key] = place
            child = self.build(value_node, depth + 1)
            child.key_place = place
            yield key, child

    def check_tag(self, node: yaml.Node, expected: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{expected}":
            self.problems.append(_problem(self.place(node), f"the tag {_short(node.tag)} is not allowed"))

    def scalar(self, node: yaml.ScalarNode) -> str | int | float | bool | None:
        text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "int":
            number = int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
            if abs(number) >= 2**63:
                raise ValueError("a number beyond 64 bits")
            return number
        if kind == "float":
            if text.lower().endswith((".inf", ".nan")) or not math.isfinite(value := float(text)):
                raise ValueError(f"{text} is not a finite number")
            return value
        if kind in ("str", "merge"):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("text with half a surrogate pair") from None
            return str(text)
        raise ValueError(f"the tag {_short(node.tag)} is not allowed")


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _place_at(file: str, text: str, index: int) -> Place:
    return Place(file, text.count("\n", 0, index) + 1, index - (text.rfind("\n", 0, index) + 1) + 1)


def _syntax_problem(error: yaml.MarkedYAMLError, file: str, text: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file, 1, 1)
    message = error.problem or error.context or "not YAML"
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    hint = error.context or ""
    if (
        "\t" in message
        or "\\t" in message
        or line.startswith("\t")
        or line[: mark.column if mark else 0].strip(" ") == "\t"
    ):
        hint = "indent with spaces: YAML allows no tabs there"
    elif "single document" in (error.context or ""):
        message, hint = "a recipe is one YAML document", "remove the `---` line and what follows it"
    return _problem(place, f"not YAML: {message}", hint)


def _problem(place: Place, message: str, hint: str = "") -> Problem:
    return Problem(message, file=place.file, line=place.line, column=place.column, hint=hint)
