"""`a1q validate`: check a recipe's text, without a model."""

from __future__ import annotations

from pathlib import Path

import click

from a1q.cli.common import errors_as_json, json_option, print_json, read_recipe, recipe_options


@click.command(
    epilog="""\b
Examples:
  a1q validate recipes/q4_to_q2.yaml
  a1q validate q4_to_q2 --set stages.q2_train.steps=800
"""
)
@recipe_options
@json_option
def command(
    recipe: str, sets: tuple[str, ...], unsets: tuple[str, ...], plugins: tuple[Path, ...], as_json: bool
) -> None:
    """Check the text of RECIPE: its keys, types, names and references.

    `plan` also checks it against the model. Exit code 2 if anything is wrong.
    """
    with errors_as_json(as_json):
        loaded, _ = read_recipe(recipe, sets, unsets, plugins)
    if as_json:
        print_json({"ok": True, "file": loaded.file, "name": loaded.name, "recipe": loaded.document})
    else:
        click.echo(f"{loaded.file} is a valid recipe: {len(loaded.stages)} stages")
