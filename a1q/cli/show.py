"""`a1q show`: what a run did."""

from __future__ import annotations

import json
from pathlib import Path

import click

from a1q.cli.common import json_option, print_json, terminal_width
from a1q.errors import UsageError


@click.command()
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Show RUN, a run folder or the name of one below `runs/`: stages, figures, exports, how it ended."""
    from a1q.engine.rundir import known_runs, read_json, read_report
    from a1q.report.rules import by_module, rules_of
    from a1q.report.summary import summary

    for folder in (Path(run), Path("runs") / run):
        report = read_report(folder)
        if report is not None:
            break
    else:
        known = "\n    ".join(str(path) for path in known_runs())
        raise UsageError(f"{run} is no run folder: it has no report.json" + (f"\n    {known}" if known else ""))
    lock = read_json(folder / "lock.json")
    if as_json:
        print_json({**report, "lock": lock})
        return
    click.echo(f"{report['name']}, seed {report['seed']}, recipe {report['recipe']}")
    if {"runtime", "packages", "processor", "a1q", "python"} <= set(lock):  # else it is damaged
        runtime = lock["runtime"]
        versions = ", ".join(f"{name} {text}" for name, text in lock["packages"].items() if text)
        click.echo(f"{runtime['device']}, amp {runtime['amp']}, {runtime['threads']} threads, {lock['processor']}")
        click.echo(f"a1q {lock['a1q']}, Python {lock['python']}, {versions}")
    click.echo(f"\n{summary(report, folder, terminal_width())}")
    for item in report["stages"]:
        if item["metrics"]:
            click.echo(f"\n{item['id']} ({item['key'][:12]})")
            for name, value in item["metrics"].items():
                click.echo(f"    {name}: {json.dumps(value, ensure_ascii=False)}")
        if chosen := rules_of(folder, item):
            click.echo(f"\n{by_module(chosen)}")
