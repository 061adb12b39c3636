"""`a1q plan`: everything but running."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from a1q.cli.common import errors_as_json, json_option, print_json, read_recipe, recipe_options

if TYPE_CHECKING:
    from a1q.engine.plan import Plan, PlannedStage


@click.command(
    epilog="""\b
Examples:
  a1q plan recipes/q4_to_q2.yaml
  a1q plan q4_to_q2 --set model.source=Qwen/Qwen3-0.6B
"""
)
@recipe_options
@json_option
@click.option("--smoke", is_flag=True, help="Plan the tiny run of `a1q run --smoke`.")
def command(
    recipe: str,
    sets: tuple[str, ...],
    unsets: tuple[str, ...],
    plugins: tuple[Path, ...],
    as_json: bool,
    smoke: bool,
) -> None:
    """Check RECIPE against its model and print what a run would do: stages, modules, disk and memory.

    Exit code 2 if the recipe is wrong, 3 if it does not fit this model, exporter or machine.
    """
    with errors_as_json(as_json):
        loaded, registry = read_recipe(recipe, sets, unsets, plugins)
        from a1q.recipe.plan import make_plan

        with contextlib.redirect_stdout(sys.stderr):  # what stages print is no result
            plan = make_plan(loaded, registry, smoke=smoke)
    facts = describe_plan(plan)
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(_lines(facts)))


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, beside what this machine has free."""
    from a1q.data.records import describe
    from a1q.engine.files import free_bytes, home
    from a1q.recipe.runtime import amp_note

    note = amp_note(plan.runtime)
    source = plan.source and {
        "source": plan.source.meta.get("source", str(plan.source.path)),
        "digest": plan.source.digest,
    }
    return {
        "ok": True,
        "name": plan.name,
        "file": plan.recipe_file,
        "seed": plan.seed,
        "runtime": vars(plan.runtime),
        "notes": [note] if note else [],
        "model": source,
        "data": {
            entry.name: {"source": entry.config.get("source"), "read": describe(entry.config)}
            for item in plan.stages
            for entry in item.data.values()
        },
        "stages": [_describe_stage(item) for item in plan.stages],
        "disk": {
            "expected": sum(item.outcome.disk_bytes for item in plan.stages),
            "free": free_bytes(home()),
            "folder": str(home()),
        },
        "memory": {
            "expected": max(item.outcome.memory_bytes for item in plan.stages),
            "available": available_memory(),
        },
    }


def available_memory() -> int | None:
    """Bytes of memory that programs can get now (Linux), or this machine's memory, or None where neither is told."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _describe_stage(item: PlannedStage) -> dict[str, Any]:
    from a1q.engine.artifact import Artifact

    inputs = {name: str(found.path) if isinstance(found, Artifact) else found for name, found in item.inputs.items()}
    return {
        "id": item.id,
        "stage": item.type,
        "inputs": inputs,
        "output": item.output,
        "data": list(item.data),
        "modules": {name: list(found) for name, found in item.modules.items()},
        "disk_bytes": item.outcome.disk_bytes,
        "memory_bytes": item.outcome.memory_bytes,
        "notes": list(item.outcome.notes),
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    from a1q.engine.matching import summarize
    from a1q.report.table import size

    runtime = facts["runtime"]
    yield f"{facts['name']} ({facts['file']})"
    yield "  " + ", ".join(
        [
            f"model {facts['model']['source']}" if facts["model"] else "no model: the recipe makes one",
            f"device {runtime['device']}",
            f"amp {runtime['amp']}",
            f"{runtime['threads']} threads",
            f"seed {facts['seed']}",
        ]
    )
    for note in facts["notes"]:
        yield f"  note: {note}"
    for name, entry in facts["data"].items():
        yield f"  data {name}: {entry['source'] + ', ' if entry['source'] else ''}{entry['read']}"
    for number, stage in enumerate(facts["stages"], 1):
        inputs = ", ".join(f"{name}: {found}" for name, found in stage["inputs"].items() if found is not None)
        cost = f"{size(stage['disk_bytes'])} disk, {size(stage['memory_bytes'])} memory"
        yield f"\n{number:3}  {stage['id']}: {stage['stage']} ({inputs or 'no input'}) -> {stage['output']}    {cost}"
        groups = [f"{name}: {', '.join(summarize(modules))}" for name, modules in stage["modules"].items()]
        for note in stage["notes"] or groups:  # stages that fit or train modules say themselves which
            yield f"       {note}"
    disk, memory = facts["disk"], facts["memory"]
    yield f"\ndisk    {size(disk['expected'])} expected, {size(disk['free'])} free at {disk['folder']}"
    available = "" if memory["available"] is None else f", {size(memory['available'])} available"
    yield f"memory  {size(memory['expected'])} expected at most{available}"
    if disk["expected"] > disk["free"]:
        yield "note: this is more than the disk has free, unless results are in the store already"
    if memory["available"] is not None and memory["expected"] > memory["available"]:
        yield "note: this is more than the memory available now"
