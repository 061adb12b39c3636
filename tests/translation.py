"""docs/coming-from-anemll.md taken apart: its tables, snippets and code spans, and what is wrong with each of them.

Entries of a table's column `here`, and code spans anywhere on the page:

- `train.lr.weights`: an option of a stage; `model.source`: a key of the recipe's root; `stages.*.from`; `*` for a name
  of one's choice; options of schemes and exporters stand where the recipe has them: `quantize.rules.*.bits`;
- `snap.mode: baked`: the same with a value that its schema takes;
- `a1q generate --max-tokens`: a command and its options;
- `a1q.recipe.load_recipe`: something that Python can import;
- in tables, also the bare name of a stage, scheme or exporter, a link to a recipe, or the word `nothing`.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jsonschema
import yaml

from a1q.recipe.schema import PLUGIN_KEYS, resolve_reference

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "coming-from-anemll.md"
NAMES = ROOT / "tests" / "coming_from_anemll.json"
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
OPTION = re.compile(r"[a-z_]+(\.([\w*]+))+(: .+)?")
MEMBER = re.compile(r"a1q(\.\w+)+")
FILES = (".safetensors", ".json", ".jsonl", ".csv", ".yaml", ".tar")


@dataclass(frozen=True)
class Table:
    """A table: the heading above it, its columns, and its rows as column -> cell."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]


def tables(text: str) -> Iterator[Table]:
    """Every table outside of snippets."""
    heading, lines = "", []
    for line in [*without_snippets(text).splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if lines:
            columns, _, *cells = lines
            for row in cells:
                assert len(row) == len(columns), f"{heading}: {row} has not the columns {columns}"
            yield Table(heading, tuple(columns), tuple(dict(zip(columns, row, strict=True)) for row in cells))
            lines = []
        if line.startswith("#"):
            heading = line.lstrip("#").strip()


def without_snippets(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def snippets(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Every code span outside of snippets."""
    return SPAN.findall(without_snippets(text))


def commands(text: str) -> list[list[str]]:
    """Every command line of the shell snippets, in words; comments are left out."""
    lines = "".join(snippets(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def recipes(text: str) -> dict[str, str]:
    """The recipes that stand on the page, by the name of the file that its command lines call them."""
    return {f"{yaml.safe_load(snippet)['name']}.yaml": snippet for snippet in snippets(text, "yaml")}


def schema(kind: str, name: str) -> dict[str, Any]:
    """The schema file of a stage, scheme or exporter."""
    return json.loads((ROOT / "schemas" / kind / f"{name}.json").read_text(encoding="utf-8"))


def names(kind: str) -> list[str]:
    """All stages, schemes or exporters that have a schema file."""
    return sorted(path.stem for path in (ROOT / "schemas" / kind).glob("*.json"))


def option_problem(entry: str) -> str | None:
    """What is wrong with an option, `train.lr.weights` or `snap.mode: baked`; None if nothing is."""
    path, _, value = entry.partition(": ")
    found = option(path)
    if not found:
        return f"no schema has `{path}`"
    if value and not any(_takes(rule, yaml.safe_load(value)) for rule in found):
        return f"`{path}` does not take {value}"
    return None


def option(path: str) -> list[dict[str, Any]]:
    """The rules at a path: none where there is no such option, several where several plug-ins have it."""
    first, *rest = path.split(".")
    if first in names("stages"):
        whole = schema("stages", first)
        return _below(whole, whole, rest)
    whole = json.loads((ROOT / "schemas" / "recipe.schema.json").read_text(encoding="utf-8"))
    return _below(whole, whole, path.split("."))


def _below(whole: Mapping[str, Any], rule: Mapping[str, Any], parts: Sequence[str]) -> list[dict[str, Any]]:
    """The rules that `parts` lead to from a rule of the schema `whole`."""
    rule = {**resolve_reference(whole, rule["$ref"]), **rule} if "$ref" in rule else dict(rule)
    if not parts:
        return [rule]
    part, rest = parts[0], parts[1:]
    found = []
    for choice in [rule, *rule.get("anyOf", ())]:
        others = choice.get("items" if choice.get("type") == "array" else "additionalProperties")
        if part == "*" and isinstance(others, Mapping):
            found += _below(whole, others, rest)
        elif part in choice.get("properties", {}):
            found += _below(whole, choice["properties"][part], rest)
    if (kind := rule.get("x-plugin")) is not None:
        if part == PLUGIN_KEYS[kind]:
            found = _below(whole, {"enum": names(kind)}, rest)
        else:
            for name in names(kind):
                plugin = schema(kind, name)
                found += [_as_it_was(item) if rule.get("x-partial") else item for item in _below(plugin, plugin, parts)]
    return found


def _as_it_was(rule: Mapping[str, Any]) -> dict[str, Any]:
    """An option that stays as it was where nothing is said of it."""
    return {key: value for key, value in rule.items() if key != "default"}


def _takes(rule: Mapping[str, Any], value: Any) -> bool:
    return jsonschema.Draft202012Validator(rule).is_valid(value)


def command_problem(words: Sequence[str]) -> str | None:
    """What is wrong with a command line, `["a1q", "generate", "--max-tokens"]`; None if nothing is.

    Options may stand without their values, as a table names them; values that stand there have to be possible ones.
    """
    try:
        _, command, rest = find_command(words)
    except click.UsageError as error:
        return error.format_message()
    options = {name: item for item in command.params for name in (*item.opts, *item.secondary_opts)}
    for number, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if not name.startswith("-") or name == "-":
            continue
        if name not in options:
            return f"`{' '.join(words)}`: there is no option {name}"
        value = value if equals else "".join(rest[number + 1 : number + 2])
        kind = options[name].type
        if isinstance(kind, click.Choice) and value and not value.startswith("-") and value not in kind.choices:
            return f"`{' '.join(words)}`: {name} does not take {value}"
    return None


def find_command(words: Sequence[str]) -> tuple[str, click.Command, list[str]]:
    """Name and command that a command line starts, and the words behind it.

    Raises:
        click.UsageError: if there is none.
    """
    from a1q.cli import cli

    assert words[0] == "a1q", words
    command: click.Command = cli
    name, rest = "", list(words[1:])
    while isinstance(command, click.Group):
        context = click.Context(command)
        if not rest:
            break
        below = command.get_command(context, rest[0])
        if below is None:
            raise click.UsageError(f"`{' '.join(words)}`: there is no command {rest[0]}")
        command, name = below, f"{name} {rest.pop(0)}".strip()
    return name, command, rest


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Name, options and arguments of a complete command line, as click reads them.

    Raises:
        click.UsageError: if an option is unknown or lacks its value.
    """
    name, command, rest = find_command(words)
    given, left, _ = command.make_parser(click.Context(command)).parse_args(rest)
    if left:
        raise click.UsageError(f"`{' '.join(words)}`: {' '.join(left)} is too much")
    return name, given


def member_problem(dotted: str) -> str | None:
    """What is wrong with a dotted Python name of a1q; its file is read, not imported."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:length])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if file.is_file():
            body: Sequence[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
            for part in parts[length:]:
                below = next((item for item in body if part in _defined(item)), None)
                if below is None:
                    return f"{file.relative_to(ROOT)} has no {part}"
                body = getattr(below, "body", ())
            return None
    return f"there is no module {parts[0]}"


def _defined(item: ast.stmt) -> list[str]:
    if isinstance(item, ast.ClassDef | ast.FunctionDef):
        return [item.name]
    if isinstance(item, ast.ImportFrom):
        return [alias.asname or alias.name for alias in item.names]
    return [target.id for target in getattr(item, "targets", ()) if isinstance(target, ast.Name)]


def span_problem(span: str) -> str | None:
    """What is wrong with a code span; None where it is right, or speaks of something that isn't checked."""
    first = span.split(".")[0]
    if span.startswith("a1q "):
        return command_problem(shlex.split(span))
    if MEMBER.fullmatch(span):
        return member_problem(span)
    roots = ("model", "data", "groups", "stages", "runtime", *names("stages"))
    if OPTION.fullmatch(span) and first in roots and not span.endswith(FILES):
        return option_problem(span)
    return None


def entry_problem(cell: str, note: str) -> str | None:
    """What is wrong with a table's cell `here`: it has to name something, or say `nothing` and why."""
    if cell == "nothing":
        return None if note else "nothing, and no reason"
    named = [*SPAN.findall(cell), *LINK.findall(cell)]
    if not named:
        return "names nothing"
    plugins = {*names("stages"), *names("schemes"), *names("exporters")}
    for entry in SPAN.findall(cell):
        checked = entry.startswith("a1q ") or OPTION.fullmatch(entry) is not None
        problem = span_problem(entry) if checked else None if entry in plugins else f"`{entry}` is no entry"
        if problem is not None:
            return problem
    return None


def default_problem(cell: str, stated: str) -> str | None:
    """Whether the column `default here` says what holds for the first entry of `here`.

    It has to be empty where there is no default or a mapping, and may be where the entry comes with a value.
    """
    first = (SPAN.findall(cell) or [""])[0]
    real = [value for value in _defaults(first) if not isinstance(value, Mapping)]
    told = [yaml.safe_load(stated)] if stated else []
    if ": " in first:  # `quantize.rest: keep` may still say that this is the default
        return None if not told or told == real else f"{stated} is not the default of `{first}`: {real}"
    if all([value] == told for value in real) and bool(real) == bool(told):
        return None
    return f"`{first}` has the default {real}, and the page says {stated or 'nothing'}"


def _defaults(entry: str) -> list[Any]:
    """The defaults of an option in every schema that has it, or that of the first option of a command."""
    if entry.startswith("a1q "):
        _, command, rest = find_command(shlex.split(entry))
        found = [item for item in command.params if set(rest[:1]) & set(item.opts)]
        return [
            item.default for item in found if isinstance(item.default, str | int | float) and item.default is not False
        ]
    rules = option(entry.partition(": ")[0]) if OPTION.fullmatch(entry) else []
    return [rule["default"] for rule in rules if "default" in rule]
