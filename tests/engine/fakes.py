"""Fake stages and hand-built plans: the engine is tested without torch and without a recipe."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from a1q.engine.events import Events
from a1q.engine.interpreter import Interpreter
from a1q.engine.plan import Plan, PlannedStage
from a1q.engine.rundir import RunFolder
from a1q.engine.selection import select
from a1q.engine.stage import Outcome, Runtime, Stage, StageContext
from a1q.engine.store import Store


class Add(Stage):
    """Writes the sum of its inputs' numbers and of its option `add`; counts how often it ran."""

    ran: ClassVar[list[str]] = []

    def plan(self, ctx: Any) -> Outcome:
        return Outcome()

    def run(self, ctx: StageContext) -> None:
        self.ran.append(ctx.id)
        total = ctx.config["add"]
        for item in ctx.inputs.values():
            total += int((item.path / "number.txt").read_text()) if item else 0
        for step in range(1, 4):
            ctx.progress(step, 3, loss=1.0 / step)
        (ctx.out / "number.txt").write_text(str(total))
        ctx.metrics["total"] = total
        if ctx.config.get("gate") is not None and total > ctx.config["gate"]:
            ctx.meta["failed_gates"] = [f"total is {total}, more than {ctx.config['gate']}"]


class Call(Stage):
    """Runs the function in its config with the context."""

    def plan(self, ctx: Any) -> Outcome:
        return Outcome()

    def run(self, ctx: StageContext) -> None:
        ctx.config["call"](ctx)


class Counting(Stage):
    """Counts to `steps` with a checkpoint in scratch after every step; can kill or stop its own process."""

    def plan(self, ctx: Any) -> Outcome:
        return Outcome()

    def run(self, ctx: StageContext) -> None:
        saved = ctx.scratch / "step.txt"
        first = int(saved.read_text()) if saved.exists() else 0
        if first:
            ctx.log(f"resumed at {first}")
        for step in range(first + 1, ctx.config["steps"] + 1):
            saved.write_text(str(step))
            if step == ctx.config.get("die_at") and not first:
                (ctx.out / "half.txt").write_text("half")
                os.kill(os.getpid(), ctx.config.get("signal", signal.SIGKILL))
            ctx.progress(step, ctx.config["steps"], loss=1.0 / step)
            time.sleep(ctx.config.get("sleep", 0))
        (ctx.out / "number.txt").write_text(str(ctx.config["steps"]))


def stage(
    name: str,
    options: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    cls: type[Stage] = Add,
    kind: str = "model",
) -> PlannedStage:
    """A planned stage whose config is its options."""
    plain = {key: value for key, value in options.items() if not callable(value)}
    return PlannedStage(
        id=name,
        type=cls.__name__.lower(),
        stage=cls(),
        config=dict(options),
        options=plain,
        inputs=dict(inputs or {}),
        output=kind,
        outcome=Outcome(),
    )


def chain(*adds: int, gate: int | None = None, kind: str = "package") -> tuple[PlannedStage, ...]:
    """Stages s1, s2, ... that each add to the one before; the last is a package with a gate."""
    made = []
    for index, add in enumerate(adds, 1):
        last = index == len(adds)
        options = {"add": add, **({"gate": gate} if last and gate is not None else {})}
        before = {"model": f"s{index - 1}"} if index > 1 else {}
        made.append(stage(f"s{index}", options, before, kind=kind if last else "model"))
    return tuple(made)


def plan_of(stages: tuple[PlannedStage, ...], smoke: bool = False, seed: int = 1) -> Plan:
    """A plan without a model."""
    return Plan("fake", seed, Runtime(), None, stages, "fake.yaml", "a1q: 1\n", {"a1q": 1}, smoke)


def execute(
    plan: Plan,
    store_root: Path,
    run: Path,
    force: bool = False,
    should_stop: Callable[[], int] = lambda: 0,
    **selection: Any,
) -> list[Mapping[str, Any]]:
    """Run a plan in a run folder, as the command does, and return its events."""
    seen: list[Mapping[str, Any]] = []
    with RunFolder(run) as folder, Store(store_root) as store:
        folder.begin(plan)
        events = Events([folder, seen.append])
        interpreter = Interpreter(
            plan, store, events, should_stop, force, before=folder.parts, progress_file=folder.progress_file
        )
        interpreter.run(select(plan, **selection))
    return seen


def caches(events: list[Mapping[str, Any]]) -> dict[str, str]:
    """Stage id -> hit or miss."""
    return {event["id"]: event["cache"] for event in events if event["event"] == "stage_end"}
