"""Put a recipe together: `use:`, `set:` and `unset:`, `--set` and `--unset`, then `${...}`.

Everything works on nodes, so that a problem found later is still shown where its value was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath

from a1q.errors import Problem, RecipeError, UsageError
from a1q.recipe import paths
from a1q.recipe.text import Node, Place, kind_of, parse_recipe, parse_value, shortened

USING_KEYS = ("a1q", "name", "use", "set", "unset")
"""Keys of a recipe that uses another one; everything else is changed through `set`."""
MAX_TEXT = 10_000
"""Longest text that `${...}` may build."""
Reader = Callable[[str, FilePath], tuple[FilePath, bytes]]


def compose(file: FilePath, root: Node, sets: Sequence[str], unsets: Sequence[str], read: Reader) -> Node:
    """Apply what a recipe uses, sets and unsets, then what the command line does, then references.

    Args:
        file: the recipe's file, from whose folder `use` is looked up.
        root: its parsed text; changed in place where it uses no other.
        sets: `PATH=VALUE` of each `--set`.
        unsets: `PATH` of each `--unset`.
        read: finds and reads a recipe by the name written in `use` and the folder to start from.

    Raises:
        RecipeError, UsageError: with every problem of the same step at once.
    """
    problems: list[Problem] = []
    if "use" in root.entries:
        root = _used(file, root.entries, read, problems)
    for key in ("set", "unset"):
        if key in root.entries:
            problems.append(_problem(root.entries[key], key, f"`{key}` stands only beside `use`"))
    if problems:
        raise RecipeError(shortened(problems))
    for item in sets:
        dotted, equals, text = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item}: expected PATH=VALUE, such as stages.train.steps=800")
        node = parse_value(text, f"--set {item}")
        assign(root, dotted, node, Place(f"--set {item}"), problems)
    for dotted in unsets:
        remove(root, dotted, Place(f"--unset {dotted}"), problems)
    if not problems:
        _References(root, problems).resolve()
    if problems:
        raise RecipeError(shortened(problems))
    return root


def assign(root: Node, dotted: str, node: Node, place: Place, problems: list[Problem]) -> None:
    """Set the value at a dotted path, making mappings on the way."""
    path = _path(root, dotted, place, problems)
    if path is None:
        return
    if path[0] == "stages" and len(path) == 2:
        problems.append(_at(place, dotted, "a stage is changed one option at a time", f"write {dotted}.OPTION"))
        return
    parent = root
    for part in path[:-1]:
        if parent.value is None:
            parent.value = {}
        if isinstance(parent.value, dict) and isinstance(part, str):
            parent = parent.value.setdefault(part, Node({}, place, place))
        elif isinstance(parent.value, list) and isinstance(part, int) and part < len(parent.value):
            parent = parent.value[part]
        else:
            problems.append(_at(place, dotted, f"{part!r} can't be set inside {kind_of(parent.plain())}"))
            return
    last = path[-1]
    if parent.value is None:
        parent.value = {}
    if isinstance(parent.value, dict) and isinstance(last, str):
        node.key_place = place
        parent.value[last] = node
    elif isinstance(parent.value, list) and isinstance(last, int) and last < len(parent.value):
        parent.value[last] = node
    else:
        problems.append(_at(place, dotted, f"{last!r} can't be set inside {kind_of(parent.plain())}"))


def remove(root: Node, dotted: str, place: Place, problems: list[Problem]) -> None:
    """Remove the key, list entry or stage at a dotted path, which must exist."""
    path = _path(root, dotted, place, problems)
    if path is None:
        return
    parent, last = paths.find(root, path[:-1]), path[-1]
    if paths.exact(root, path) is None:
        hint = paths.suggest(str(last), parent.entries, "there are")
        problems.append(_at(place, dotted, "there is nothing to unset", hint))
    elif isinstance(parent.value, list):
        del parent.value[int(last)]
    else:
        del parent.entries[str(last)]


def _used(file: FilePath, root: dict[str, Node], read: Reader, problems: list[Problem]) -> Node:
    """The recipe that `use` names, with this file's `set` and `unset` applied."""
    use = root["use"]
    for key, node in root.items():
        if key not in USING_KEYS:
            hint = f"change it through `set`: {{{key}: ...}}"
            problems.append(_problem(node, key, f"{key!r} can't stand beside `use`", hint, at_key=True))
    if not isinstance(use.value, str):
        problems.append(_problem(use, "use", f"expected the file of a recipe, found {kind_of(use.plain())}"))
        return Node({}, use.place)
    try:
        used_file, data = read(use.value, file.parent)
    except UsageError as error:
        problems.append(_problem(use, "use", str(error)))
        return Node({}, use.place)
    base = parse_recipe(data, str(used_file))
    for key in ("use", "set", "unset"):
        if key in base.entries:
            problems.append(
                _problem(
                    base.entries[key],
                    key,
                    f"{file.name} uses this recipe, so it can't say `{key}` itself",
                    f"use {use.value!r} only if it is complete; one level of `use` is allowed",
                )
            )
            return Node({}, use.place)
    changes = root.get("set", Node({}, use.place))
    if isinstance(changes.value, dict):
        for dotted, node in changes.value.items():
            assign(base, dotted, node, node.key_place or node.place, problems)
    else:
        problems.append(_problem(changes, "set", f"expected PATH: VALUE pairs, found {kind_of(changes.plain())}"))
    removals = root.get("unset", Node([], use.place))
    if isinstance(removals.value, list):
        for node in removals.value:
            remove(base, str(node.plain()), node.place, problems)
    else:
        problems.append(_problem(removals, "unset", f"expected a list of paths, found {kind_of(removals.plain())}"))
    for key in ("a1q", "name"):
        if key in root:
            base.entries[key] = root[key]
    return base


class _References:
    """Replaces `${path}` by the scalar that stands earlier in the recipe; `$${` is a plain `${`."""

    pattern = re.compile(r"\$(\$\{)|\$\{([^{}]*)(\}?)")

    def __init__(self, root: Node, problems: list[Problem]):
        self.root = root
        self.problems = problems
        self.ids = paths.stage_ids(root)
        self.earlier: dict[str, Node] = {}

    def resolve(self) -> None:
        """Walk the recipe in order and replace every reference."""
        self._visit(self.root, ())

    def _visit(self, node: Node, path: paths.Path) -> None:
        if isinstance(node.value, dict):
            for key, child in node.value.items():
                self._visit(child, (*path, key))
        elif isinstance(node.value, list):
            for index, child in enumerate(node.value):
                self._visit(child, (*path, index))
        else:
            dotted = paths.show(self.ids, path)
            if isinstance(node.value, str) and "${" in node.value:
                self._replace(node, node.value, dotted)
            self.earlier[dotted] = node

    def _replace(self, node: Node, text: str, dotted: str) -> None:
        whole = self.pattern.fullmatch(text)
        if whole and whole.group(3):
            found = self._value(whole.group(2), node, dotted)
            node.value = found.value if found else None
            return
        node.value = self.pattern.sub(lambda match: self._text(match, node, dotted), text)
        if len(node.value) > MAX_TEXT:
            self.problems.append(_problem(node, dotted, f"references build a text of more than {MAX_TEXT} characters"))
            node.value = None

    def _text(self, match: re.Match[str], node: Node, dotted: str) -> str:
        if match.group(1):
            return "${"
        if not match.group(3):
            self.problems.append(_problem(node, dotted, "`${` without `}`", "write `$${` for a plain `${`"))
            return ""
        found = self._value(match.group(2), node, dotted)
        if found is None or found.value is None:
            return ""
        return str(found.value).lower() if isinstance(found.value, bool) else str(found.value)

    def _value(self, name: str, node: Node, dotted: str) -> Node | None:
        found = self.earlier.get(name.strip())
        if found is None:
            hint = paths.suggest(name, self.earlier, "earlier scalars")
            message = f"${{{name}}} is not a scalar that stands earlier in the recipe"
            self.problems.append(_problem(node, dotted, message, hint))
        return found


def _path(root: Node, dotted: str, place: Place, problems: list[Problem]) -> paths.Path | None:
    try:
        return paths.parse_path(root, dotted)
    except ValueError as error:
        problems.append(_at(place, dotted, *error.args))
        return None


def _at(place: Place, path: str, message: str, hint: str = "") -> Problem:
    return Problem(message, place.file, place.line, place.column, path, hint)


def _problem(node: Node, path: str, message: str, hint: str = "", at_key: bool = False) -> Problem:
    return _at((node.key_place if at_key else None) or node.place, path, message, hint)
