"""`a1q schema`: one JSON Schema of everything, for editors."""

from __future__ import annotations

from pathlib import Path

import click

from a1q.cli.common import plugin_option, print_json


@click.command(
    epilog="""\b
Example:
  a1q schema > recipe.schema.json
and in the first line of a recipe, for editors with the YAML language server:
  # yaml-language-server: $schema=recipe.schema.json
"""
)
@plugin_option
def command(plugins: tuple[Path, ...]) -> None:
    """Print the JSON Schema of a whole recipe, with every stage, scheme and exporter that is installed."""
    from a1q.engine.registry import load_registry
    from a1q.recipe.composed import composed_schema

    print_json(composed_schema(load_registry(plugins)))
