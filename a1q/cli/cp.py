"""`a1q cp`: a copy of a recipe to edit."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from a1q.errors import UsageError


@click.command(
    epilog="""\b
Examples:
  a1q cp q4_to_q2                  writes ./q4_to_q2.yaml
  a1q cp q4_to_q2 mine.yaml
"""
)
@click.argument("recipe")
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite DESTINATION.")
def command(recipe: str, destination: Path | None, force: bool) -> None:
    """Copy RECIPE, shipped or your own, to DESTINATION (a file or folder; default: this folder)."""
    from a1q.engine.files import write_atomic
    from a1q.recipe import find_recipe

    source = find_recipe(recipe, Path())
    target = destination or Path(source.name)
    if target.is_dir():
        target /= source.name
    if target.exists() and not force:
        raise UsageError(f"{target} is there already; name another file, or overwrite it with --force")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder")
    try:
        text = source.read_text(encoding="utf-8")
        write_atomic(target, _with_use_from(text, source, target))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source} can't be copied to {target}: {error}") from None
    click.echo(f"{target}  (check it with `a1q validate {target}`, run it with `a1q run {target}`)")


def _with_use_from(text: str, source: Path, target: Path) -> str:
    """The text with the file of `use:` as seen from the target's folder."""
    from a1q.recipe import find_recipe, shipped_recipes

    found = re.search(r"^use:[ \t]*(['\"]?)([^'\"#\n]+?)\1[ \t]*(#.*)?$", text, re.MULTILINE)
    if found is None:
        return text
    used = find_recipe(found.group(2), source.parent).resolve()
    shipped = {path.resolve(): name for name, path in shipped_recipes().items()}
    name = shipped.get(used) or os.path.relpath(used, target.parent.resolve())
    return f"{text[: found.start(2)]}{name}{text[found.end(2) :]}"
