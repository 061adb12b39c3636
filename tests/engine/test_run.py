"""Whole runs in processes of their own: killed, terminated, interrupted, two at once, without the shared store."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from a1q.engine.run import RunOptions, run_plan
from a1q.engine.rundir import read_lines
from a1q.errors import A1QError, GateError, StageError
from tests.engine.fakes import Add, Call, Counting, chain, plan_of, stage

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import sys
from pathlib import Path
from a1q.engine.run import RunOptions, run_plan
from a1q.errors import A1QError
from tests.engine.fakes import Counting, chain, plan_of, stage

options = {OPTIONS}
stages = (*chain(1, 2, kind="model"), stage("count", options, {"model": "s2"}, Counting, "package"))
try:
    run_plan(plan_of(stages), Path(sys.argv[1]), say=lambda text: print(text, flush=True))
except A1QError as error:
    print(error)
    sys.exit(error.exit_code)
assert "torch" not in sys.modules
"""


def start(run: Path, home: Path, **options: Any) -> subprocess.Popen[str]:
    code = DRIVER.replace("{OPTIONS}", repr(options))
    environment = {**os.environ, "A1Q_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    Add.ran.clear()


def test_kill_dash_nine_then_the_same_command_resumes_inside_the_stage(tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    first = start(run, home, steps=6, die_at=4)
    assert first.wait(60) == -signal.SIGKILL
    assert report(run)["status"] == "running" and report(run)["running"] == "count"
    assert list((home / "tmp").glob("*/half.txt"))
    second = start(run, home, steps=6, die_at=4)
    assert second.wait(60) == 0
    done = report(run)
    assert done["status"] == "done" and "running" not in done
    assert [item["cache"] for item in done["stages"]] == ["hit", "hit", "miss"]
    messages = [line.get("message") for line in read_lines(run / "events.jsonl")]
    assert "resumed at 4" in messages
    assert sorted(os.listdir(run / "export" / "count")) == ["number.txt"]
    assert not list((home / "tmp").iterdir()) and not list((home / "work").iterdir())
    assert [line["step"] for line in read_lines(run / "metrics" / "count.jsonl")] == [1, 2, 3, 5, 6]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_at_the_next_progress_and_the_run_resumes(tmp_path: Path, number: int, code: int) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    options = {"steps": 6, "die_at": 3, "signal": int(number)}
    first = start(run, home, **options)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == code, said
    assert "stopping at the next safe point" in said and "the same command resumes" in said
    assert report(run)["status"] == "interrupted"
    assert start(run, home, **options).wait(60) == 0
    assert report(run)["status"] == "done"
    assert any(line.get("message") == "resumed at 3" for line in read_lines(run / "events.jsonl"))


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, tmp_path / "home", steps=2, sleep=60)
    _wait_for(lambda: (run / "metrics" / "count.jsonl").exists() and (run / "metrics" / "count.jsonl").read_text())
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and "once more stops at once" in process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


def test_two_runs_in_one_folder_and_two_folders_at_once(tmp_path: Path) -> None:
    home, run = tmp_path / "home", tmp_path / "one"
    first = start(run, home, steps=10, sleep=0.2)
    _wait_for(lambda: (run / "metrics" / "count.jsonl").exists())
    same = start(run, home, steps=10, sleep=0.2)
    said, _ = same.communicate(timeout=60)
    assert same.returncode == 1 and f"process {first.pid} is running in" in said
    other = start(tmp_path / "two", home, steps=10, sleep=0.2)
    assert first.wait(60) == 0 and other.wait(60) == 0
    assert [item["cache"] for item in report(tmp_path / "two")["stages"]] == ["hit"] * 3
    waited = [line.get("message", "") for line in read_lines(tmp_path / "two" / "events.jsonl")]
    assert any(f"waiting for process {first.pid}" in text for text in waited)


def test_without_the_cache_nothing_of_the_machine_is_read_or_written(tmp_path: Path) -> None:
    plan, run = plan_of(chain(1, 2)), tmp_path / "run"
    run_plan(plan, run)
    before = sorted(tmp_path.joinpath("home", "store").rglob("*"))
    for _ in range(2):
        run_plan(plan, run, RunOptions(no_cache=True))
        assert [item["cache"] for item in report(run)["stages"]] == ["miss", "miss"]
    assert sorted(tmp_path.joinpath("home", "store").rglob("*")) == before
    assert Path(report(run)["stages"][0]["artifact"]).is_relative_to(run / "store")


@pytest.mark.parametrize("options", [RunOptions(force=True), RunOptions(no_cache=True)])
def test_a_forced_run_that_failed_goes_on_where_it_was(tmp_path: Path, options: RunOptions) -> None:
    broken = [True]

    def sometimes(ctx: Any) -> None:
        if broken:
            raise StageError("not today")
        (ctx.out / "number.txt").write_text("1")

    plan = plan_of((*chain(1, kind="model"), stage("s2", {"call": sometimes}, {"model": "s1"}, Call)))
    with pytest.raises(StageError):
        run_plan(plan, tmp_path / "run", options)
    assert report(tmp_path / "run")["running"] == "s2"
    broken.clear()
    run_plan(plan, tmp_path / "run", options)
    assert [item["cache"] for item in report(tmp_path / "run")["stages"]] == ["hit", "miss"]
    run_plan(plan, tmp_path / "run", options)
    assert [item["cache"] for item in report(tmp_path / "run")["stages"]] == ["miss", "miss"]


def test_the_report_says_how_a_run_ended(tmp_path: Path) -> None:
    with pytest.raises(GateError):
        run_plan(plan_of(chain(1, 2, gate=0)), tmp_path / "run")
    assert report(tmp_path / "run")["status"] == "gate failed"
    assert "more than 0" in report(tmp_path / "run")["error"]
    broken = stage("s1", {"call": lambda ctx: 1 / 0}, cls=Call)
    with pytest.raises(ZeroDivisionError):
        run_plan(plan_of((broken,)), tmp_path / "run")
    assert report(tmp_path / "run")["status"] == "failed"
    assert report(tmp_path / "run")["error"] == "division by zero"


def test_a_full_disk_under_the_run_folder_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("a1q.engine.rundir.copy_file", full)
    with pytest.raises(A1QError, match=r"no space left in .*run: [\d,]+ bytes free"):
        run_plan(plan_of(chain(1)), tmp_path / "run")
    assert report(tmp_path / "run")["status"] == "failed"


def test_a_disk_that_is_really_full_and_then_is_not(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(home)]
        return shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode

    if not mount("size=512k"):
        pytest.skip("mounting a small file system is not permitted here")
    try:
        big = stage("s1", {"call": lambda ctx: (ctx.out / "big").write_bytes(b"x" * 2_000_000)}, cls=Call)
        with pytest.raises(StageError, match=r"s1: no space left in .*home: [\d,]+ bytes free"):
            run_plan(plan_of((big,)), tmp_path / "run")
        assert not list((home / "store").rglob("*")) and not list((home / "tmp").iterdir())
        assert mount("remount,size=4m")
        run_plan(plan_of((big,)), tmp_path / "run")
        assert report(tmp_path / "run")["status"] == "done"
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_stages_see_their_own_seed_inputs_and_an_empty_folder(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def look(ctx: Any) -> None:
        seen[ctx.id] = (ctx.seed, list(ctx.out.iterdir()), list(ctx.inputs))
        (ctx.out / "number.txt").write_text("1")

    stages = (stage("a", {"call": look}, cls=Call), stage("b", {"call": look}, {"model": "a"}, Call))
    run_plan(plan_of(stages), tmp_path / "run")
    assert seen["a"][1:] == ([], []) and seen["b"][1:] == ([], ["model"])
    assert seen["a"][0] != seen["b"][0]


def test_counting_alone_is_deterministic(tmp_path: Path) -> None:
    run_plan(plan_of((stage("c", {"steps": 3}, cls=Counting),)), tmp_path / "run")
    digest = report(tmp_path / "run")["stages"][0]["digest"]
    run_plan(plan_of((stage("c", {"steps": 3}, cls=Counting),)), tmp_path / "run", RunOptions(force=True))
    assert report(tmp_path / "run")["stages"][0]["digest"] == digest


def _wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_folder_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))

    def vanish(ctx: Any) -> None:
        shutil.rmtree(tmp_path / "run")
        (ctx.out / "number.txt").write_text("1")

    with pytest.raises(StageError, match=r"the run folder .*run was removed"):
        run_plan(plan_of((stage("s1", {"call": vanish}, cls=Call),)), tmp_path / "run")


def test_a_full_disk_under_the_run_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("a1q.engine.rundir.write_atomic", full)
    with pytest.raises(StageError, match=r"no space left in .*run"):
        run_plan(plan_of(chain(1)), tmp_path / "run")
