"""`a1q inspect`: what is inside a model, a package, a cache."""

from __future__ import annotations

import os

import click

from a1q.cli.common import errors_as_json, json_option, print_json
from a1q.errors import UsageError


@click.command(
    epilog="""\b
Examples:
  a1q inspect runs/q4-to-q2                      its last model
  a1q inspect q4-to-q2:q2_train --modules
  a1q inspect q4-to-q2:teacher                   a teacher's cache
  a1q inspect runs/q4-to-q2/export/ane --json    a Core ML package
"""
)
@click.argument("artifact")
@click.option("--modules", "each", is_flag=True, help="A line for every quantized module of a model.")
@click.option("--module", "pattern", metavar="REGEX", help="Look at quantized modules of whole names like this only.")
@json_option
def command(artifact: str, each: bool, pattern: str | None, as_json: bool) -> None:
    """Look into ARTIFACT: a run (its last model), RUN:STAGE_ID, a folder of the store, a model folder, an adapter or a
    Core ML package. Of a model: schemes, bits, bytes by kind, use of look-up tables, ranges of scales, and how its
    numbers fit fp16. Files of the store are checked against their digests.
    """
    with errors_as_json(as_json):
        from a1q.engine.pattern import compile_pattern
        from a1q.looking.inspection import inspect
        from a1q.looking.target import find
        from a1q.report.inspection import modules_of, text_of

        os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of the libraries between our lines
        try:
            matcher = compile_pattern(pattern if pattern is not None else ".*")
        except ValueError as error:
            raise UsageError(f"--module: {error}") from None
        found = inspect(find(artifact), lambda name: bool(matcher.fullmatch(name)))
        if (each or pattern is not None) and found["kind"] != "model":
            raise UsageError(f"--modules and --module are for models, and {artifact} is a {found['kind']}")
        if pattern is not None and not found["modules"]:
            quantized = [name for rule in found["rules"] if rule["scheme"] for name in rule["modules"]]
            raise UsageError(f"--module {pattern} matches no quantized module{_near(pattern, quantized)}")
    if as_json:
        print_json({"ok": True, **found})
        return
    click.echo(text_of(found))
    if each or pattern is not None:
        click.echo(f"\n{modules_of(found)}")


def _near(pattern: str, names: list[str]) -> str:
    import difflib

    from a1q.engine.matching import summarize

    near = difflib.get_close_matches(pattern, names, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(summarize(names)) or 'none'}"
