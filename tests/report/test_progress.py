"""What a run prints: bounded plain lines, one live line on a terminal, JSON for programs."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from a1q.engine.events import Events
from a1q.report.progress import JsonLines, Lines

STAGES = [{"id": "teacher", "stage": "kd"}, {"id": "q4", "stage": "train"}]


class Clock:
    """Stands in for `time` where events are stamped."""

    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("a1q.engine.events.time", made)
    return made


def play(listener: Any, clock: Clock, seconds_per_step: float = 1.0, steps: int = 60) -> None:
    events = Events([listener])
    events("run_start", name="demo", run="runs/demo", stages=STAGES, smoke=False)
    events("stage_start", id="teacher", stage="kd", key="k")
    events("stage_end", id="teacher", stage="kd", seconds=0.4, cache="hit", metrics={"sequences": 2048, "kl": 0.01})
    events("stage_start", id="q4", stage="train", key="k")
    events("stage_run", id="q4", because=["options.steps"])
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        events("progress", id="q4", step=step, total=100, loss=1.0 / step, tokens_per_second=5120.4)
    events("log", id="q4", message="a word")
    events("stage_end", id="q4", stage="train", seconds=61.0, cache="miss", metrics={"kl": 0.0123456, "kept": "best"})
    events("run_end", status="done", error=None, seconds=61.4)


def test_plain_lines_are_few_and_say_what_is_needed(clock: Clock) -> None:
    stream = io.StringIO()
    play(Lines(stream), clock)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "demo: 2 stages in runs/demo"
    assert " ".join(lines[2].split()) == "= [1/2] teacher kd 0.4 s from the store kl 0.01 sequences 2,048"
    assert "running (changed: options.steps)" in lines[3]
    progress = [line for line in lines if "step " in line]
    assert [line.split("step ")[1].split("/")[0] for line in progress] == ["11", "21", "31", "41", "51"]
    assert "step 51/100, 49 s left, loss 0.01961, 5,120 tokens/s" in progress[-1]
    assert lines[-2].strip() == "q4: a word"
    assert " ".join(lines[-1].split()) == "+ [2/2] q4 train 1:01 kl 0.01235"
    assert "\x1b" not in stream.getvalue()


def test_the_live_line_is_redrawn_in_place_and_fits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    stream = io.StringIO()
    play(Lines(stream, live=True), clock, seconds_per_step=0.05)
    text = stream.getvalue()
    assert text.count("\n") == 5
    drawn = [part for part in text.split("\r\x1b[K") if "step" in part]
    assert 20 <= len(drawn) <= 31
    assert all(len(part) <= 49 for part in drawn)
    ended = [line for line in text.split("\n") if "from the store" in line]
    assert len(ended[0].rpartition("\x1b[K")[2]) <= 70 and "(+1)" in ended[0]  # one figure is always shown
    assert text.endswith("\r\x1b[K")


TRAINING = {
    "step": 300,
    "total": 4000,
    "loss": 0.0123456,
    "tune": 0.0234567,
    "tokens_per_second": 5120.4,
    "lr": 0.5,
    "norm": 1.25,
    "seconds_left": 731.0,
    "memory_bytes": 1_234_000_000,
    "kl": 0.011,
}
MAIN = "step 300/4000, 12 min left, loss 0.01235, tune 0.02346, 5,120 tokens/s"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (160, f"> [2/2] q4      train        {MAIN}, 1.2 GB, lr 0.5, norm 1.25, kl 0.011"),
        (110, f"> [2/2] q4      train        {MAIN}, 1.2 GB"),
        (90, f"> [2/2] q4      {MAIN}"),
        (80, "> [2/2] q4      step 300/4000, 12 min left, loss 0.01235, tune 0.02346"),
        (50, "> [2/2] q4      step 300/4000, 12 min left"),
        (20, "> [2/2] q4      ste"),
    ],
)
def test_a_narrow_terminal_gives_up_the_least_important_figures(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int, line: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    events = Events([Lines(stream, live=True)])
    events("run_start", name="demo", run="runs/demo", stages=STAGES, smoke=False)
    events("stage_start", id="q4", stage="train", key="k")
    events("progress", id="q4", **TRAINING)
    assert stream.getvalue().rpartition("\x1b[K")[2] == line


def test_figures_that_are_no_numbers_stay_valid_json(clock: Clock) -> None:
    stream = io.StringIO()
    events = Events([JsonLines(stream), Lines(io.StringIO())])
    events("run_start", name="demo", run="runs/demo", stages=STAGES, smoke=True)
    events("progress", id="q4", step=1, total=2, loss=float("nan"))
    line = stream.getvalue().splitlines()[1]
    assert "NaN" not in line
    assert json.loads(line) == {"time": 1000.0, "event": "progress", "id": "q4", "step": 1, "total": 2, "loss": None}
