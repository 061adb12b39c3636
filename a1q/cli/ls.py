"""`a1q ls`: what there is to name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from a1q.cli.common import json_option, plugin_option, print_json

if TYPE_CHECKING:
    from a1q.engine.registry import Registry

KINDS = ("recipes", "stages", "schemes", "exporters", "runs")


@click.command()
@click.argument("kind", required=False, type=click.Choice(KINDS))
@plugin_option
@json_option
def command(kind: str | None, plugins: tuple[Path, ...], as_json: bool) -> None:
    """List recipes, stages, schemes, exporters and runs, or one KIND of them."""
    from a1q.engine.registry import load_registry

    registry = load_registry(plugins)
    found = {name: entries(name, registry) for name in ([kind] if kind else KINDS)}
    if as_json:
        print_json(found)
        return
    width = max((len(name) for names in found.values() for name in names), default=0)
    for title, names in found.items():
        if not kind:
            click.echo(f"{title}:")
        for name, about in names.items():
            click.echo(f"{'' if kind else '  '}{name:{width}}  {about}".rstrip())
        if not names and not kind:
            click.echo("  none")


def entries(kind: str, registry: Registry) -> dict[str, str]:
    """Name -> one line about it."""
    if kind == "recipes":
        from a1q.recipe import shipped_recipes

        return {name: _first_comment(path) for name, path in shipped_recipes().items()}
    if kind == "runs":
        from a1q.engine.rundir import known_runs, read_report

        return {str(folder): str((read_report(folder) or {}).get("status", "")) for folder in known_runs()}
    return {name: _first_sentence(registry.schema(kind, name).get("description", "")) for name in registry.names(kind)}


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".")
