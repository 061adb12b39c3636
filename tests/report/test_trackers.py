"""Experiment trackers look on: what they are given, and that a run goes on without them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from a1q.engine.events import Events
from a1q.errors import MismatchError
from a1q.report.trackers import Tracking, require


class FakeRun:
    """What `wandb.init` gives, and what was done with it."""

    def __init__(self, **asked: Any):
        self.asked = asked
        self.metrics: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, float]] = []
        self.ended: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


class FakeWandB(types.ModuleType):
    """Stands in for the package `wandb`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[FakeRun] = []

    def init(self, **asked: Any) -> FakeRun:
        assert Path(asked["dir"]).is_dir()
        self.runs.append(FakeRun(**asked))
        return self.runs[-1]


class FakeWriter:
    """Stands in for tensorboard's writer."""

    made: FakeWriter

    def __init__(self, folder: str):
        self.folder = folder
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        FakeWriter.made = self

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


def play(tracking: Tracking, run: Path, status: str = "done") -> None:
    events = Events([tracking])
    events("run_start", name="demo", run=str(run), stages=[{"id": "q4", "stage": "train"}], smoke=False)
    events("stage_start", id="q4", stage="train", key="k")
    events("progress", id="q4", step=1, total=2, loss=0.5, best=True)
    events("progress", id="q4", step=2, total=2, loss=float("nan"), tune=0.25)
    events("log", id="q4", message="a word")
    events("progress", id="q2", step=1, total=1, loss=4)
    events("run_end", status=status, error=None, seconds=1.0)


@pytest.fixture(autouse=True)
def _no_names_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1), ("interrupted", 1)])
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, code: int) -> None:
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    said: list[str] = []
    play(Tracking("wandb", tmp_path, {"seed": 7, "stages": ({"kd": {}},)}, said.append), tmp_path, status)
    (made,) = wandb.runs
    assert made.asked == {
        "project": "a1q",
        "name": tmp_path.name,
        "dir": str(tmp_path),
        "config": {"seed": 7, "stages": [{"kd": {}}]},
    }
    assert made.metrics == [("q4/step", None), ("q4/*", "q4/step"), ("q2/step", None), ("q2/*", "q2/step")]
    assert made.logged == [
        {"q4/step": 1, "q4/loss": 0.5},
        {"q4/step": 2, "q4/tune": 0.25},
        {"q2/step": 1, "q2/loss": 4.0},
    ]
    assert made.ended == code and said == []


def test_wandb_under_names_of_its_own_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "my-qat-project")
    monkeypatch.setenv("WANDB_NAME", "experiment-1")
    play(Tracking("wandb", tmp_path, {}, print), tmp_path)
    (made,) = wandb.runs
    assert (made.asked["project"], made.asked["name"]) == ("my-qat-project", "experiment-1")


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    said: list[str] = []
    play(Tracking("tensorboard", tmp_path, {}, said.append), tmp_path)
    assert FakeWriter.made.folder == str(tmp_path / "tensorboard")
    assert FakeWriter.made.scalars == [("q4/loss", 0.5, 1), ("q4/tune", 0.25, 2), ("q2/loss", 4.0, 1)]
    assert FakeWriter.made.closed and said == []


def test_tensorboards_own_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    play(Tracking("tensorboard", tmp_path, {}, said.append), tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(item.step, item.value) for item in read.Scalars("q4/loss")] == [(1, 0.5)]
    assert [(item.step, item.value) for item in read.Scalars("q4/tune")] == [(2, 0.25)]
    assert said == []


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    wandb = FakeWandB()
    calls: list[str] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(method)
        raise ConnectionError("no network")

    monkeypatch.setattr(FakeWandB if method == "init" else FakeRun, method, fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    said: list[str] = []
    play(Tracking("wandb", tmp_path, {}, said.append), tmp_path)
    assert said == ["wandb failed and is left out; the run goes on: ConnectionError: no network"]
    assert calls == [method]
    assert sum(len(run.logged) for run in wandb.runs) == (3 if method == "finish" else 0)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a1q.report.trackers.find_spec", lambda name: None)
    with pytest.raises(MismatchError, match="--track wandb needs the package wandb") as caught:
        require("wandb")
    assert caught.value.problems[0].hint == 'pip install "a1q[wandb]", or leave it out'
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB())
    require("wandb")
