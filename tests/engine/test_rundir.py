"""The run folder: what it holds after a run, and whom it lets in."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from a1q.engine.artifact import PROGRESS
from a1q.engine.garbage import references
from a1q.engine.rundir import RunFolder, export, known_runs, read_lines, read_report
from a1q.errors import A1QError, UsageError
from tests.engine.fakes import Counting, chain, execute, plan_of, stage


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))


def test_every_file_of_the_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    execute(plan_of(chain(1, 2)), tmp_path / "home", run)
    assert (run / "recipe.yaml").read_text() == "a1q: 1\n"
    assert (run / "resolved.yaml").read_text() == "a1q: 1\n"
    lock = json.loads((run / "lock.json").read_text())
    assert lock["packages"]["numpy"] and lock["python"] and lock["processor"] and lock["runtime"]["threads"] == 1
    assert set(lock["keys"]) == {"s1", "s2"}
    kinds = [line["event"] for line in read_lines(run / "events.jsonl")]
    assert kinds == ["stage_start", "stage_run", "stage_end"] * 2
    steps = [line["step"] for line in read_lines(run / "metrics" / "s1.jsonl")]
    assert steps == [1, 2, 3]
    report = json.loads((run / "report.json").read_text())
    assert report["exports"] == {"s2": "export/s2"}
    assert [(item["id"], item["stage"], item["cache"]) for item in report["stages"]] == [
        ("s1", "add", "miss"),
        ("s2", "add", "miss"),
    ]
    assert known_runs() == [run]


def test_a_hit_brings_its_learning_curve_into_a_new_run_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        execute(plan_of(chain(1, 2)), tmp_path / "home", tmp_path / name)
    for kind in ("jsonl", "csv"):
        curves = [(tmp_path / name / "metrics" / f"s2.{kind}").read_text() for name in ("one", "two")]
        assert curves[0] == curves[1] != ""


def test_exports_are_copies_and_are_mended(tmp_path: Path) -> None:
    plan, run = plan_of(chain(1, 2)), tmp_path / "run"
    events = execute(plan, tmp_path / "home", run)
    exported = run / "export" / "s2" / "number.txt"
    stored = Path(events[-1]["artifact"]) / "number.txt"
    assert os.listdir(run / "export" / "s2") == ["number.txt"]
    assert exported.stat().st_ino != stored.stat().st_ino and stored.stat().st_nlink == 1
    exported.write_text("spoilt by hand")
    assert stored.read_text() == "3"
    execute(plan, tmp_path / "home", run)
    assert exported.read_text() == "3"


def test_an_export_that_is_right_is_left_alone(tmp_path: Path) -> None:
    plan, run = plan_of(chain(1, 2)), tmp_path / "run"
    events = execute(plan, tmp_path / "home", run)
    before = (run / "export" / "s2" / "number.txt").stat().st_ino
    export(Path(events[-1]["artifact"]), run / "export" / "s2")
    assert (run / "export" / "s2" / "number.txt").stat().st_ino == before


def test_a_second_run_in_the_folder_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run"),
        pytest.raises(A1QError, match=f"process {os.getpid()} is running in .*run; one run at a time") as caught,
    ):
        RunFolder(tmp_path / "run")
    assert caught.value.exit_code == 1


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("my thesis")
    with pytest.raises(UsageError, match="neither empty nor the folder of a run"):
        RunFolder(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(UsageError, match="is a file"):
        RunFolder(tmp_path / "thesis.txt")


def test_lines_torn_by_a_kill_are_passed_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    execute(plan_of(chain(1)), tmp_path / "home", run)
    with open(run / "events.jsonl", "a") as handle:
        handle.write('{"event": "stage_st')
    execute(plan_of(chain(1)), tmp_path / "home", run)
    kinds = [line["event"] for line in read_lines(run / "events.jsonl")]
    assert kinds == ["stage_start", "stage_run", "stage_end", "stage_start", "stage_end"]


def test_progress_of_a_resumed_stage_has_every_step_once(tmp_path: Path) -> None:
    counting = plan_of((stage("s1", {"steps": 6}, cls=Counting),))
    path = tmp_path / "run" / "metrics" / "s1.jsonl"
    path.parent.mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    path.write_text(
        "".join(json.dumps({"step": step, "total": 6, "old": True}) + "\n" for step in range(1, 6)) + '{"st'
    )

    from a1q.engine.cachekey import key_of, key_parts

    key = key_of(key_parts(counting, counting.stages[0], {}, {}))
    scratch = tmp_path / "home" / "work" / key
    scratch.mkdir(parents=True)
    (scratch / "step.txt").write_text("3")
    execute(counting, tmp_path / "home", tmp_path / "run")
    lines = list(read_lines(path))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["old" in line for line in lines] == [True] * 3 + [False] * 3
    assert [row["step"] for row in rows(tmp_path / "run")] == list("123456")
    assert [row["old"] for row in rows(tmp_path / "run")] == ["true"] * 3 + [""] * 3


def rows(run: Path, stage_id: str = "s1") -> Sequence[dict[str, str]]:
    with open(run / "metrics" / f"{stage_id}.csv", newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_table_of_a_curve_says_what_its_lines_say(tmp_path: Path) -> None:
    execute(plan_of(chain(1)), tmp_path / "home", tmp_path / "run")
    lines = list(read_lines(tmp_path / "run" / "metrics" / "s1.jsonl"))
    table = rows(tmp_path / "run")
    assert [float(row["loss"]) for row in table] == [line["loss"] for line in lines]
    assert [float(row["time"]) for row in table] == [line["time"] for line in lines]
    assert list(table[0])[:3] == ["step", "total", "loss"] and list(table[0])[-1] == "time"


def test_an_interrupted_stage_has_its_table(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.begin(plan_of(chain(1)))
        for step in (1, 2):
            folder({"event": "progress", "id": "s1", "time": 5.0 + step, "step": step, "total": 9, "kl": 0.5})
        assert not (tmp_path / "run" / "metrics" / "s1.csv").exists()
        folder({"event": "run_end", "time": 9.0, "status": "interrupted", "error": "stopped", "seconds": 1.0})
        assert (tmp_path / "run" / "metrics" / "s1.csv").read_text() == "step,total,kl,time\n1,9,0.5,6.0\n2,9,0.5,7.0\n"


def test_the_next_run_writes_the_table_of_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "metrics" / "gone.jsonl").write_text('{"step": 1, "total": 2, "loss": 0.5}\n{"step": 2, "lo')
    execute(plan_of(chain(1)), tmp_path / "home", tmp_path / "run")
    assert rows(tmp_path / "run", "gone") == [{"step": "1", "total": "2", "loss": "0.5"}]


def test_a_hit_without_a_curve_leaves_no_table_of_another_run(tmp_path: Path) -> None:
    plan, run = plan_of(chain(1)), tmp_path / "run"
    events = execute(plan, tmp_path / "home", run)
    (Path(events[-1]["artifact"]) / PROGRESS).unlink()
    execute(plan, tmp_path / "home", run)
    assert list((run / "metrics").iterdir()) == []


@pytest.mark.parametrize("place", ["home", "home/store", "home/store/mine", "home/work/mine", "other/../home/tmp"])
def test_a_folder_of_the_store_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match="belongs to the store"):
        RunFolder(tmp_path / place)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("place", ["file/run", "n" * 300])
def test_a_folder_that_can_not_be_made_is_refused_by_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be used as a run folder"):
        RunFolder(tmp_path / place)


@pytest.mark.parametrize("name", ["report.json", "lock.json", "events.jsonl", "metrics/s1.jsonl"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"5", b"\xff\x00", b'{"stages": 5, "keys": 5, "status": "failed"}']
)
def test_a_damaged_file_of_the_run_folder_is_written_anew(tmp_path: Path, name: str, content: bytes) -> None:
    plan, run = plan_of(chain(1, 2)), tmp_path / "run"
    execute(plan, tmp_path / "home", run)
    (run / name).write_bytes(content)
    keys = {key for key, runs in references().items() if run in runs}
    assert len(keys) == 2  # report.json and lock.json both say what a run refers to
    execute(plan, tmp_path / "home", run)
    report = read_report(run)
    assert report is not None and [item["cache"] for item in report["stages"]] == ["hit", "hit"]
    assert set(json.loads((run / "lock.json").read_text())["keys"]) == {"s1", "s2"}


def test_notes_of_runs_that_are_no_notes_are_passed_over(tmp_path: Path) -> None:
    execute(plan_of(chain(1)), tmp_path / "home", tmp_path / "run")
    (tmp_path / "home" / "runs" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "home" / "runs" / "folder.txt").mkdir()
    assert known_runs() == [tmp_path / "run"]
