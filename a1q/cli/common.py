"""What several commands share: the options that name and change a recipe, plug-ins, and JSON output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from a1q.errors import A1QError, ProblemsError

if TYPE_CHECKING:
    from a1q.engine.registry import Registry
    from a1q.recipe import Recipe

Function = TypeVar("Function", bound=Callable[..., Any])

plugin_option = click.option(
    "--plugin",
    "plugins",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.py",
    help="Load stages, schemes or exporters from a file of yours. It is executed: trust it. Repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document for programs.")


class Number(click.FloatRange):
    """A range that nan is not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does."""
        number = super().convert(value, param, ctx)
        return number if number == number else self.fail("nan is no number", param, ctx)


def recipe_options(function: Function) -> Function:
    """Add the argument RECIPE and the options --set, --unset and --plugin.

    The function receives `recipe: str`, `sets: tuple[str, ...]`, `unsets: tuple[str, ...]` and
    `plugins: tuple[Path, ...]`; `read_recipe` takes all four.
    """
    options = (
        click.argument("recipe"),
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="PATH=VALUE",
            help="Change one value: --set stages.q2_train.steps=800 (a stage by its id). Repeatable.",
        ),
        click.option("--unset", "unsets", multiple=True, metavar="PATH", help="Remove one key or stage. Repeatable."),
        plugin_option,
    )
    for option in reversed(options):
        function = option(function)
    return function


def read_recipe(
    recipe: str, sets: Sequence[str], unsets: Sequence[str], plugins: Sequence[Path]
) -> tuple[Recipe, Registry]:
    """Load the plug-ins and the recipe that the options of `recipe_options` name.

    Raises:
        RecipeError, UsageError: as `a1q.recipe.load_recipe` and `a1q.engine.registry.load_registry` do.
    """
    from a1q.engine.registry import load_registry
    from a1q.recipe import load_recipe

    registry = load_registry(plugins)
    return load_recipe(recipe, sets=sets, unsets=unsets, registry=registry), registry


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is; None if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_json(value: Any) -> None:
    """Print a value as indented JSON on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def errors_as_json(enabled: bool) -> Iterator[None]:
    """With `enabled`, a user's error is also printed as `{"ok": false, "error": ..., "problems": [...]}`."""
    try:
        yield
    except A1QError as error:
        if enabled:
            problems = [dataclasses.asdict(item) for item in error.problems] if isinstance(error, ProblemsError) else []
            print_json({"ok": False, "exit_code": error.exit_code, "error": str(error), "problems": problems})
        raise
