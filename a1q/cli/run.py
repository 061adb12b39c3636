"""`a1q run`: execute a recipe."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from a1q.cli.common import read_recipe, recipe_options, terminal_width
from a1q.errors import A1QError, ProblemsError

if TYPE_CHECKING:
    from a1q.engine.plan import Plan

EPILOG = """\b
Examples:
  a1q run recipes/q4_to_q2.yaml
  a1q run recipes/q4_to_q2.yaml --smoke
  a1q run recipes/q4_to_q2.yaml --set model.source=Qwen/Qwen3-0.6B -o runs/qwen
  a1q run recipes/q4_to_q2.yaml --only ane
  a1q run recipes/q4_to_q2.yaml --track tensorboard

The same command resumes a run that was interrupted, killed or ran out of disk.
"""


@click.command(epilog=EPILOG)
@recipe_options
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Run folder [runs/NAME].")
@click.option("--from", "start", metavar="ID", help="Start at this stage; earlier ones only where they are needed.")
@click.option("--until", metavar="ID", help="Stop after this stage.")
@click.option("--only", multiple=True, metavar="ID", help="Run this stage and what it needs. Repeatable.")
@click.option("--force", is_flag=True, help="Run the stages asked for again, even if the store has their results.")
@click.option("--no-cache", is_flag=True, help="Run everything in a store of its own inside the run folder.")
@click.option("--smoke", is_flag=True, help="One tiny step of every stage, exports included; gates are not judged.")
@click.option(
    "--launch",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Train and build caches in N processes of this machine, one per GPU or sharing its processors. For several "
    "machines start the command with torchrun or accelerate launch.",
)
@click.option(
    "--track",
    "trackers",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb"]),
    help="Show training's figures there too: tensorboard files in the run folder, or a Weights & Biases run (its own "
    "environment variables say how). Changes no result. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print events for programs, one JSON object a line.")
def command(
    recipe: str,
    sets: tuple[str, ...],
    unsets: tuple[str, ...],
    plugins: tuple[Path, ...],
    output: Path | None,
    smoke: bool,
    launch: int,
    trackers: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Run RECIPE: a file, or the name of a shipped recipe. Results that are in the store are not computed again."""
    from a1q.engine.run import RunOptions, run_plan
    from a1q.engine.world import world_here
    from a1q.recipe.plan import make_plan
    from a1q.recipe.runtime import amp_note
    from a1q.report.progress import JsonLines, Lines
    from a1q.report.trackers import Tracking, require

    options, world = RunOptions(**asked), world_here()
    with _error_line(as_json and world.leads):
        for name in trackers if world.leads else ():
            require(name)
        loaded, registry = read_recipe(recipe, sets, unsets, plugins)
        stream = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # what stages and libraries print is no result
            plan = make_plan(loaded, registry, smoke=smoke)
        if launch > 1 and world.alone:
            _in_processes(launch, plan)
        if world.leads and (note := amp_note(plan.runtime)):
            click.echo(f"a1q: {note}", err=True)
        for line in _decided(plan) if world.leads else ():
            click.echo(f"a1q: {line}", err=True)
        folder = output or Path("runs") / (f"{plan.name}-smoke" if smoke else plan.name)
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of other libraries would draw over our progress
        listener = JsonLines(stream) if as_json else Lines(stream, live=stream.isatty())
        tracking = [Tracking(name, folder, plan.resolved, _say) for name in dict.fromkeys(trackers) if world.leads]
        with _closing_table(folder if world.leads and not as_json else None), contextlib.redirect_stdout(sys.stderr):
            run_plan(plan, folder, options, [listener, *tracking], _say, world)


def _decided(plan: Plan) -> list[str]:
    """What `format: auto` has made of files, entry by entry."""
    from a1q.data.records import describe
    from a1q.data.tables import is_local

    entries = {name: entry.config for stage in plan.stages for name, entry in stage.data.items()}
    asked = [
        name
        for name, config in entries.items()
        if config.get("format") == "auto" and config.get("column") is None and is_local(config.get("source"))
    ]
    return [f"data.{name} is read as {describe(entries[name])}" for name in asked]


def _say(text: str) -> None:
    """Tell it below the line that the terminal may be drawing."""
    click.echo(f"\na1q: {text}", err=True)


def _in_processes(count: int, plan: Plan) -> NoReturn:
    """The same command line in `count` processes; exits as they end.

    Raises:
        MismatchError: if they can't share the plan's device.
    """
    from a1q.engine.launch import launch
    from a1q.engine.world import World, problem_on
    from a1q.errors import MismatchError

    if (problem := problem_on(plan.runtime.device, World(0, count))) is not None:
        raise MismatchError([problem])
    raise click.exceptions.Exit(launch(sys.argv[1:], count, lambda text: click.echo(f"a1q: {text}", err=True)))


@contextlib.contextmanager
def _error_line(enabled: bool) -> Iterator[None]:
    """With `enabled`, a user's error is also one JSON line, the last, with the exit code."""
    try:
        yield
    except A1QError as error:
        if enabled:
            problems = [vars(item) for item in error.problems] if isinstance(error, ProblemsError) else []
            line = {"event": "error", "exit_code": error.exit_code, "error": str(error), "problems": problems}
            click.echo(json.dumps(line, ensure_ascii=False))
        raise


@contextlib.contextmanager
def _closing_table(folder: Path | None) -> Iterator[None]:
    """Print the summary of the run folder when the run has ended, well or not."""
    from a1q.engine.rundir import read_report
    from a1q.report.summary import summary

    old = read_report(folder) if folder else None
    try:
        yield
    finally:
        report = read_report(folder) if folder else None
        if folder and report and report != old:
            click.echo(f"\n{summary(report, folder, terminal_width())}")
