"""Training's figures in experiment trackers: `a1q run --track NAME`. They look on: a run goes on without them.

A tracker is a class of `TRACKERS` with `package`, `__init__(folder, config)`, `add(stage_id, step, figures)` and
`close(good)`. It imports its package only when it is made. Stages whose results come from the store tell nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from a1q.engine.events import plain
from a1q.errors import MismatchError, Problem

_NO_FIGURES = ("time", "event", "id", "step", "total")


class TensorBoard:
    """Scalars in `RUN/tensorboard/`; `tensorboard --logdir RUN` shows them."""

    package = "tensorboard"

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def add(self, stage_id: str, step: int, figures: Mapping[str, float]) -> None:
        """Each figure as scalar `STAGE/NAME` at the stage's own step."""
        for name, value in figures.items():
            self.writer.add_scalar(f"{stage_id}/{name}", value, step)

    def close(self, good: bool) -> None:
        """Write what is not on the disk yet."""
        self.writer.close()


class WandB:
    """One Weights & Biases run with the resolved recipe as its config: project `a1q`, called as the run folder, unless
    W&B's own variables WANDB_PROJECT and WANDB_NAME say otherwise."""

    package = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        project = os.environ.get("WANDB_PROJECT") or "a1q"  # arguments of `init` would win over the variables
        name = os.environ.get("WANDB_NAME") or folder.absolute().name
        self.run = wandb.init(project=project, name=name, dir=str(folder), config=plain(config))
        self.stages: set[str] = set()

    def add(self, stage_id: str, step: int, figures: Mapping[str, float]) -> None:
        """Figures as `STAGE/NAME`, drawn over `STAGE/step`: W&B's own step only grows, and each stage begins anew."""
        if stage_id not in self.stages:
            self.stages.add(stage_id)
            self.run.define_metric(f"{stage_id}/step")
            self.run.define_metric(f"{stage_id}/*", step_metric=f"{stage_id}/step")
        self.run.log({f"{stage_id}/step": step, **{f"{stage_id}/{name}": value for name, value in figures.items()}})

    def close(self, good: bool) -> None:
        """Upload the rest and say how the run ended."""
        self.run.finish(exit_code=0 if good else 1)


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def require(name: str) -> None:
    """Check, without importing it, that a tracker's package is there.

    Raises:
        MismatchError: if it isn't; the hint is the command that installs it.
    """
    package = TRACKERS[name].package
    if not _installed(package):
        raise MismatchError(
            [Problem(f"--track {name} needs the package {package}", hint=f'pip install "a1q[{name}]", or leave it out')]
        )


class Tracking:
    """Listens to a run's events for one tracker. When the tracker fails, that is said once, and it is left out."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], say: Callable[[str], None]):
        self.name, self.folder, self.config, self.say = name, folder, config, say
        self.tracker: TensorBoard | WandB | None = None
        self.failed = False

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Pass one event on, if it is one that trackers take."""
        if self.failed or event["event"] not in ("run_start", "progress", "run_end"):
            return
        try:
            self._pass(event)
        except Exception as error:  # whatever the package raises
            self.failed, self.tracker = True, None
            self.say(f"{self.name} failed and is left out; the run goes on: {type(error).__name__}: {error}")

    def _pass(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "run_start":  # now the run folder is there and ours
            self.tracker = TRACKERS[self.name](self.folder, self.config)
        elif self.tracker is not None and event["event"] == "progress":
            figures = {name: float(value) for name, value in event.items() if _is_figure(name, value)}
            self.tracker.add(event["id"], event["step"], figures)
        elif self.tracker is not None:
            tracker, self.tracker = self.tracker, None
            tracker.close(event["status"] == "done")


def _is_figure(name: str, value: Any) -> bool:
    return name not in _NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module put in place by hand, without a spec
        return True
