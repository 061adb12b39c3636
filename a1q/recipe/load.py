"""Find, read, compose and check a recipe: from a name on the command line to a `Recipe`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from a1q.engine.registry import ROOT, Registry
from a1q.errors import UsageError
from a1q.recipe.compose import compose
from a1q.recipe.paths import suggest
from a1q.recipe.recipe import Recipe
from a1q.recipe.text import MAX_BYTES, parse_recipe
from a1q.recipe.validate import validate

SHIPPED = ROOT / "recipes"


def load_recipe(
    name: str | Path, *, sets: Sequence[str] = (), unsets: Sequence[str] = (), registry: Registry
) -> Recipe:
    """Read a recipe, apply `use`, overrides and references, and check everything that needs no model.

    Args:
        name: a file, or the name of a shipped recipe (`q4_to_q2`).
        sets: `PATH=VALUE`, as of `--set`.
        unsets: `PATH`, as of `--unset`.
        registry: the stages, schemes and exporters that the recipe may name.

    Raises:
        RecipeError: with all root problems at once, each at its place.
        UsageError: if there is no such recipe, or an override is not PATH=VALUE.
    """
    file, data = read_recipe(str(name), Path())
    root = parse_recipe(data, str(file))
    text = data.decode("utf-8-sig")
    root = compose(file, root, sets, unsets, read_recipe)
    return validate(str(file), text, root, registry)


def read_recipe(name: str, folder: Path) -> tuple[Path, bytes]:
    """Find a recipe and read its bytes, one more than are allowed at most.

    Raises:
        UsageError: if there is none, or it can't be read.
    """
    file = find_recipe(name, folder)
    try:
        with open(file, "rb") as handle:
            return file, handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from None


def find_recipe(name: str, folder: Path) -> Path:
    """The file of a recipe: `name` in `folder`, else a shipped recipe, with or without its ending.

    Raises:
        UsageError: if there is none; the message names the nearest.
    """
    if not name:
        raise UsageError("the name of a recipe is empty")
    asked = Path(name)
    with contextlib.suppress(OSError):  # a name too long for a file
        for candidate in (folder / asked, folder / f"{name}.yaml"):
            if candidate.exists() and not candidate.is_dir():  # a pipe is good too: `a1q run <(...)`
                return candidate
    shipped = shipped_recipes()
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    if short in shipped:
        return shipped[short]
    with contextlib.suppress(OSError):
        if (folder / asked).is_dir():
            raise UsageError(f"{name} is a folder, not a recipe")
    raise UsageError(f"there is no recipe {shown!r}; {suggest(short, shipped, 'shipped recipes')}")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with a1q, by name: `q4_to_q2`, `qwen3-0.6b/q4_to_q2`."""
    files = sorted(SHIPPED.rglob("*.yaml"))
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in files}
