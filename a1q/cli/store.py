"""`a1q store`: look after the artifacts of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from a1q.cli.common import json_option, print_json
from a1q.errors import UsageError

if TYPE_CHECKING:
    from a1q.engine.store import Store


@click.group()
def command() -> None:
    """Look after the store ($A1Q_HOME, default ~/.cache/a1q): list, clean, move artifacts between machines."""


@command.command("ls")
@json_option
def list_entries(as_json: bool) -> None:
    """List the artifacts, the latest used first."""
    from a1q.engine.store import Store
    from a1q.report.table import size, table

    store = Store()
    facts = sorted(_facts(store), key=lambda item: -item["used"])
    if as_json:
        print_json(facts)
        return
    rows = [
        [
            item["key"][:12],
            item["stage"],
            item["type"],
            item["kind"],
            size(item["bytes"]),
            f"{max(0.0, time.time() - item['used']) / 86400:.0f} d ago",
            ", ".join(item["runs"]) or "-",
        ]
        for item in facts
    ]
    if rows:
        click.echo(table(["key", "stage", "type", "kind", "size", "used", "runs"], rows, right=[4, 5]))
    click.echo(f"{len(rows)} artifacts, {size(sum(item['bytes'] for item in facts))} in {store.root}")


def _facts(store: Store) -> Iterable[dict[str, Any]]:
    from a1q.engine.artifact import MANIFEST, RECORD
    from a1q.engine.files import tree_size
    from a1q.engine.garbage import references
    from a1q.engine.rundir import read_json

    referred = references()
    for key in store.published():
        folder = store.folder(key)
        record, manifest = read_json(folder / RECORD), read_json(folder / MANIFEST)
        yield {
            "key": key,
            "stage": record.get("stage", "?"),
            "type": record.get("type", "?"),
            "kind": manifest.get("kind", "?"),
            "bytes": tree_size(folder),
            "used": folder.stat().st_mtime,
            "runs": [str(path) for path in referred.get(key, ())],
        }


@command.command("gc")
@click.option(
    "--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Instead: whatever was not used so long."
)
@click.option("--delete", is_flag=True, help="Really delete; without it, only say what would go.")
def collect(older_than: float | None, delete: bool) -> None:
    """Delete artifacts that no run folder refers to, and checkpoints nobody came back to for 30 days."""
    from a1q.engine.garbage import find_garbage, remove_garbage
    from a1q.engine.store import Store
    from a1q.report.table import size

    with Store() as store:
        items = find_garbage(store, older_than)
        for item in items:
            click.echo(f"{item.key[:12]}  {size(item.bytes):>9}  {item.reason}")
        total = size(sum(item.bytes for item in items))
        if not delete:
            click.echo(f"{len(items)} folders, {total} would be freed" + ("; --delete does it" if items else ""))
            return
        removed = remove_garbage(store, items)
        store.sweep()
        click.echo(f"{len(removed)} folders deleted, {size(sum(item.bytes for item in removed))} freed")
        if len(removed) < len(items):
            click.echo(f"{len(items) - len(removed)} are in use now and stay")


@command.command("pack")
@click.argument("what", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.tar", help="To write.")
@click.option("--stage", "stages", multiple=True, metavar="ID", help="Of a run, only this stage. Repeatable.")
def pack_entries(what: tuple[str, ...], output: Path, stages: tuple[str, ...]) -> None:
    """Pack artifacts into one tar file. WHAT is a run folder or the beginning of a key (see `a1q store ls`)."""
    from a1q.engine.store import Store
    from a1q.engine.transfer import pack
    from a1q.report.table import size

    store = Store()
    keys = list(dict.fromkeys(key for item in what for key in _keys(store, item, stages)))
    for entry in pack(store, keys, output):
        click.echo(f"{entry.key[:12]}  {entry.record['stage']} ({entry.record['type']})")
    click.echo(f"{output}: {size(output.stat().st_size)}")


def _keys(store: Store, what: str, stages: tuple[str, ...]) -> list[str]:
    from a1q.engine.rundir import read_report

    report = read_report(Path(what))
    if report is not None:
        found = {item["id"]: item["key"] for item in report["stages"]}
        for name in stages:
            if name not in found:
                raise UsageError(f"run {what} has no finished stage {name}; it has {', '.join(found) or 'none'}")
        return [key for name, key in found.items() if not stages or name in stages]
    keys = [key for key in store.published() if key.startswith(what.lower())]
    if len(keys) != 1:
        count = "no" if not keys else str(len(keys))
        raise UsageError(f"{what} is no run folder, and {count} keys in {store.root} begin so; see `a1q store ls`")
    return keys


@command.command("unpack")
@click.argument("archive", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def unpack_entries(archive: Path) -> None:
    """Put the artifacts of ARCHIVE into this store, digests checked. Unpack only what you trust: nothing in it is
    executed, but later runs take its results for their own."""
    from a1q.engine.store import Store
    from a1q.engine.transfer import unpack

    with Store() as store:
        for key, new in unpack(store, archive).items():
            click.echo(f"{key[:12]}  {'unpacked' if new else 'was here already'}")
