"""`a1q plot`: pictures of a run."""

from __future__ import annotations

from pathlib import Path

import click

from a1q.errors import MismatchError, UsageError

FORMATS = ("png", "svg")


@click.command(
    epilog="""\b
Examples:
  a1q plot runs/q4-to-q2
  a1q plot q4-to-q2 --stage q2_train --format svg -o pictures
"""
)
@click.argument("run")
@click.option("--stage", "stages", multiple=True, metavar="ID", help="Only what this stage has. Repeatable.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(FORMATS),
    help="Write this alone. Repeatable.  [default: both]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where to.  [default: RUN/plots]",
)
def command(run: str, stages: tuple[str, ...], formats: tuple[str, ...], output: Path | None) -> None:
    """Draw RUN, a run folder or the name of one below `runs/`: losses, learning rates, gradient norms and speed of
    every stage that trained, errors by layer of those that quantized, and KL from stage to stage. Needs
    `pip install 'a1q[plots]'`.
    """
    import difflib

    from a1q.engine.rundir import known_runs, read_report
    from a1q.report.curves import charts_of, labels_of
    from a1q.report.plots import draw, require_matplotlib

    folder = next((path for path in (Path(run), Path("runs") / run) if read_report(path) is not None), None)
    if folder is None:
        known = [path.name for path in known_runs()]
        near = difflib.get_close_matches(Path(run).name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{run} is no run folder: it has no report.json{hint}")
    report = read_report(folder)
    assert report is not None
    names = [item["id"] for item in report["stages"]]
    for stage in stages:
        if stage not in names:
            near = difflib.get_close_matches(stage, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UsageError(f"there is no stage {stage!r} in {folder}; {hint}")
    if stages:
        report["stages"] = [item for item in report["stages"] if item["id"] in stages]
    charts = charts_of(report, folder)
    if not charts:
        whose = f"the stages chosen, {', '.join(stages)}, neither" if stages else "no stage of it"
        raise MismatchError(f"{folder} has nothing to draw: {whose} trained {'n' * bool(stages)}or quantized")
    require_matplotlib()
    target = output or folder / "plots"
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{target} can't be made: {error.strerror}") from None
    for chart in charts:
        labels = labels_of(report) if chart.name == "kl" else ()
        for path in draw(chart, target, formats or FORMATS, labels):
            click.echo(path)
