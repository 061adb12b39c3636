"""One run of a plan in a run folder: lock, store, signals, interpreter, and an honest end whatever happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from a1q.engine.events import Events, Listener
from a1q.engine.files import remove_tree, told_disk_errors
from a1q.engine.follow import follow
from a1q.engine.interpreter import Interpreter
from a1q.engine.plan import Plan
from a1q.engine.rundir import RunFolder
from a1q.engine.selection import Selection, select
from a1q.engine.signals import stop_on_signals
from a1q.engine.store import Store
from a1q.engine.world import ALONE, World, joined
from a1q.errors import A1QError, GateError, Interrupted, StageError


@dataclass(frozen=True)
class RunOptions:
    """What `a1q run` can be asked."""

    start: str | None = None
    """First stage; earlier ones are only gone through where they are needed."""
    until: str | None = None
    """Last stage."""
    only: Sequence[str] = ()
    """These stages and what they need."""
    force: bool = False
    """Run the stages asked for again; their results replace those in the store."""
    no_cache: bool = False
    """Use a store inside the run folder, emptied first: nothing is taken from or left in the machine's store."""


def run_plan(
    plan: Plan,
    path: Path,
    options: RunOptions = RunOptions(),
    listeners: Sequence[Listener] = (),
    say: Callable[[str], None] = lambda text: None,
    world: World = ALONE,
) -> None:
    """Execute `plan` with `path` as its run folder; the same call resumes what was interrupted or killed.

    In a process that doesn't lead `world`, take part in the parallel stages of the one that does.

    Raises:
        A1QError: of the kind and exit code that `a1q.errors` documents; report.json tells the same.
    """
    selection = select(plan, options.start, options.until, options.only)
    with joined(world, plan.runtime.device):
        if not world.leads:
            with stop_on_signals(lambda text: None):  # process 0 decides when to stop
                return follow(plan, world)
        _lead(plan, selection, path, options, listeners, say, world)
        world.shared(None)


def _lead(
    plan: Plan,
    selection: Selection,
    path: Path,
    options: RunOptions,
    listeners: Sequence[Listener],
    say: Callable[[str], None],
    world: World,
) -> None:
    with RunFolder(path) as folder, stop_on_signals(say) as stop, _disk_errors_told(folder.path):
        before = folder.previous if folder.resumes else {}
        if options.no_cache and not before.get("no_cache"):
            remove_tree(path / "store")
        done = {item["key"] for item in before.get("stages", ()) if item["cache"] == "miss"}
        with Store(path.absolute() / "store" if options.no_cache else None) as store:
            with contextlib.suppress(OSError):  # what can't be swept now is swept another time
                store.sweep()
            folder.begin(plan, force=options.force, no_cache=options.no_cache)
            events = Events([folder, *listeners])
            interpreter = Interpreter(
                plan,
                store,
                events,
                stop,
                force=options.force,
                spared=done if before.get("force") else (),
                before=dict(folder.parts),
                world=world,
                progress_file=folder.progress_file,
            )
            stages = [{"id": item.id, "stage": item.type} for item in selection.stages]
            started = time.monotonic()
            events("run_start", name=plan.name, run=str(path), stages=stages, smoke=plan.smoke)
            try:
                interpreter.run(selection)
            except BaseException as error:
                with contextlib.suppress(OSError, A1QError):  # the first error is the one to tell
                    text = str(error) or type(error).__name__
                    events("run_end", status=_status(error), error=text, seconds=_since(started))
                raise
            events("run_end", status="done", error=None, seconds=_since(started))


@contextlib.contextmanager
def _disk_errors_told(folder: Path) -> Iterator[None]:
    """Say so when the run folder's disk is full, can't be written, or the folder was removed meanwhile."""
    try:
        with told_disk_errors(folder):
            yield
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        raise StageError(f"the run folder {folder} was removed while the run went on") from error


def _status(error: BaseException) -> str:
    if isinstance(error, GateError):
        return "gate failed"
    return "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)
