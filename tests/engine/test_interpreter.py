"""Hits, misses, selection, gates, failures."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from a1q.engine.artifact import Artifact
from a1q.engine.stage import DataEntry
from a1q.errors import GateError, Interrupted, StageError, UsageError
from tests.engine.fakes import Add, Call, caches, chain, execute, plan_of, stage


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    Add.ran.clear()


def run(tmp_path: Path, plan: Any, **options: Any) -> dict[str, str]:
    return caches(execute(plan, tmp_path / "home", tmp_path / "run", **options))


def report(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "report.json").read_text())


def test_second_run_is_all_hits_and_runs_nothing(tmp_path: Path) -> None:
    plan = plan_of(chain(1, 2, 3))
    assert run(tmp_path, plan) == {"s1": "miss", "s2": "miss", "s3": "miss"}
    assert run(tmp_path, plan) == {"s1": "hit", "s2": "hit", "s3": "hit"}
    assert Add.ran == ["s1", "s2", "s3"]
    assert report(tmp_path)["stages"][2]["metrics"] == {"total": 6}


def test_editing_stage_five_runs_five_and_later_only(tmp_path: Path) -> None:
    run(tmp_path, plan_of(chain(1, 1, 1, 1, 1, 1, 1)))
    changed = run(tmp_path, plan_of(chain(1, 1, 1, 1, 9, 1, 1)))
    assert [name for name, cache in changed.items() if cache == "miss"] == ["s5", "s6", "s7"]


def test_a_changed_stage_with_an_equal_result_leaves_the_later_ones_alone(tmp_path: Path) -> None:
    first, second, last = chain(1, 2, 3)
    run(tmp_path, plan_of((first, second, last)))
    noted = stage("s1", {"add": 1, "note": "other options, same number"})
    assert run(tmp_path, plan_of((noted, second, last))) == {"s1": "miss", "s2": "hit", "s3": "hit"}


def test_the_reason_of_a_miss_is_told(tmp_path: Path) -> None:
    run(tmp_path, plan_of(chain(1, 2)))
    events = execute(plan_of(chain(1, 5)), tmp_path / "home", tmp_path / "run")
    because = {event["id"]: event["because"] for event in events if event["event"] == "stage_run"}
    assert because == {"s2": ["options.add"]}


def test_seed_and_smoke_and_data_enter_the_key(tmp_path: Path) -> None:
    run(tmp_path, plan_of(chain(1)))
    assert run(tmp_path, plan_of(chain(1), seed=2)) == {"s1": "miss"}
    assert run(tmp_path, plan_of(chain(1), smoke=True)) == {"s1": "miss"}
    assert run(tmp_path, plan_of(chain(1))) == {"s1": "hit"}


def test_data_digest_is_asked_for_when_a_stage_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    digests = {"text.jsonl": "d1"}
    asked = []

    def prepare(config: Any) -> str:
        asked.append(config["source"])
        return digests[config["source"]]

    monkeypatch.setattr("a1q.data.prepare", prepare, raising=False)
    seen = []
    reader = stage("s1", {"call": lambda ctx: (seen.append(ctx.data["text"].digest), _write(ctx))}, cls=Call)
    reader = dataclasses.replace(reader, data={"text": DataEntry("text", {"source": "text.jsonl", "seq_len": 8})})
    assert run(tmp_path, plan_of((reader,))) == {"s1": "miss"}
    assert seen == ["d1"]
    assert run(tmp_path, plan_of((reader,))) == {"s1": "hit"}
    digests["text.jsonl"] = "d2"
    assert run(tmp_path, plan_of((reader,))) == {"s1": "miss"}
    assert asked == ["text.jsonl"] * 3
    lock = json.loads((tmp_path / "run" / "lock.json").read_text())
    assert lock["data"]["text"] == {"source": "text.jsonl", "revision": None, "digest": "d2"}


def test_a_moved_model_is_the_same_input(tmp_path: Path) -> None:
    def planned(folder: str) -> Any:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "number.txt").write_text("4")
        plan = plan_of((stage("s1", {"add": 1}, {"model": "model"}),))
        return type(plan)(**{**vars(plan), "source": Artifact("model", tmp_path / folder, "abc")})

    assert run(tmp_path, planned("here")) == {"s1": "miss"}
    assert run(tmp_path, planned("there")) == {"s1": "hit"}
    assert report(tmp_path)["stages"][0]["metrics"] == {"total": 5}


def test_only_from_until(tmp_path: Path) -> None:
    plan = plan_of((*chain(1, 2, 3), stage("apart", {"add": 7})))
    assert run(tmp_path, plan, until="s2") == {"s1": "miss", "s2": "miss"}
    assert run(tmp_path, plan, only=["s3"]) == {"s1": "hit", "s2": "hit", "s3": "miss"}
    assert run(tmp_path, plan, start="apart") == {"apart": "miss"}
    assert run(tmp_path, plan, start="s2", until="s2") == {"s1": "hit", "s2": "hit"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"only": ["s9"]}, "--only s9: there is no such stage; this recipe has s1, s2"),
        ({"start": "s2", "until": "s1"}, "--from s2 comes after --until s1"),
        ({"only": ["s1"], "until": "s1"}, "--only can't be combined"),
    ],
)
def test_a_wrong_selection_is_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        run(tmp_path, plan_of(chain(1, 2)), **options)


def test_force_runs_what_was_asked_for_only(tmp_path: Path) -> None:
    plan = plan_of(chain(1, 2, 3))
    run(tmp_path, plan)
    assert run(tmp_path, plan, force=True, only=["s2"]) == {"s1": "hit", "s2": "miss"}
    assert run(tmp_path, plan, force=True) == {"s1": "miss", "s2": "miss", "s3": "miss"}
    assert run(tmp_path, plan) == {"s1": "hit", "s2": "hit", "s3": "hit"}


def test_failed_gate_keeps_the_measurement_and_fails_again_on_the_hit(tmp_path: Path) -> None:
    stages = (*chain(1, 2, gate=2), stage("later", {"add": 1}))
    for cache in ("miss", "hit"):
        with pytest.raises(GateError, match=r"stage s2: total is 3, more than 2"):
            run(tmp_path, plan_of(stages))
        last = report(tmp_path)["stages"][-1]
        assert (last["id"], last["cache"], last["metrics"]) == ("s2", cache, {"total": 3})
        assert last["failed_gates"] == ["total is 3, more than 2"]
    assert "later" not in Add.ran


def test_gates_are_not_judged_in_a_smoke_run(tmp_path: Path) -> None:
    assert run(tmp_path, plan_of(chain(1, 2, gate=2), smoke=True)) == {"s1": "miss", "s2": "miss"}


def test_a_failing_stage_publishes_nothing_and_keeps_its_scratch(tmp_path: Path) -> None:
    def fail(ctx: Any) -> None:
        (ctx.out / "half.txt").write_text("half")
        (ctx.scratch / "checkpoint").write_text("kept")
        raise StageError("the loss is not finite")

    with pytest.raises(StageError, match="loss is not finite"):
        run(tmp_path, plan_of((stage("s1", {"call": fail}, cls=Call),)))
    assert not list((tmp_path / "home" / "store").rglob("*"))
    assert not list((tmp_path / "home" / "tmp").iterdir())
    assert [path.read_text() for path in (tmp_path / "home" / "work").rglob("checkpoint")] == ["kept"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_folder_and_the_free_bytes(tmp_path: Path, error: Exception) -> None:
    def fail(ctx: Any) -> None:
        (ctx.out / "half.txt").write_text("half")
        raise error

    with pytest.raises(StageError, match=r"s1: no space left in .*home: [\d,]+ bytes free"):
        run(tmp_path, plan_of((stage("s1", {"call": fail}, cls=Call),)))
    assert not list((tmp_path / "home" / "store").rglob("*"))


def test_a_disk_that_fills_while_publishing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("a1q.engine.store.fsync_tree", full)
        with pytest.raises(StageError, match="no space left"):
            run(tmp_path, plan_of(chain(1)))
    assert not list((tmp_path / "home" / "store").rglob("*"))
    assert run(tmp_path, plan_of(chain(1))) == {"s1": "miss"}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ctx: None, "wrote no file"),
        (lambda ctx: (_write(ctx), ctx.metrics.update(kl=float("nan"))), "metrics.kl came out as NaN"),
        (lambda ctx: (ctx.out / "link").symlink_to("/etc/passwd"), "link is a link"),
        (lambda ctx: (ctx.out / "entry.json").write_text("{}"), "entry.json belongs to the store"),
    ],
)
def test_what_is_no_artifact_is_not_published(tmp_path: Path, call: Any, text: str) -> None:
    with pytest.raises(StageError, match=text):
        run(tmp_path, plan_of((stage("s1", {"call": call}, cls=Call),)))
    assert not list((tmp_path / "home" / "store").rglob("*"))


def test_a_defect_of_a_stage_stays_a_traceback_and_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(tmp_path, plan_of((stage("s1", {"call": lambda ctx: 1 / 0}, cls=Call),)))
    assert caught.value.__notes__ == ["in stage s1 (call)"]


def test_a_stop_request_is_honoured_at_the_next_progress(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, plan_of(chain(1)), should_stop=lambda: 15)
    assert caught.value.exit_code == 143


def test_global_generators_start_from_the_stage_seed(tmp_path: Path) -> None:
    import random

    import numpy

    drawn = []

    def draw(ctx: Any) -> None:
        drawn.append((random.random(), float(numpy.random.rand())))
        _write(ctx)

    plan = plan_of((stage("s1", {"call": draw}, cls=Call), stage("s2", {"call": draw}, cls=Call)))
    run(tmp_path, plan)
    run(tmp_path, plan, force=True)
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def _write(ctx: Any) -> None:
    (ctx.out / "number.txt").write_text("1")


def test_a_stage_that_exits_the_process_is_a_failed_stage(tmp_path: Path) -> None:
    def leave(ctx: Any) -> None:
        sys.exit(7)

    with pytest.raises(StageError, match="stage s1 asked the process to exit \\(7\\)"):
        execute(plan_of((stage("s1", {"call": leave}, cls=Call),)), tmp_path / "home", tmp_path / "run")


def test_a_model_replaced_while_a_stage_reads_it_gives_no_result(tmp_path: Path) -> None:
    number = tmp_path / "source" / "number.txt"
    number.parent.mkdir()
    number.write_text("1")
    source = Artifact("model", number.parent, "1", digest_now=number.read_text)

    def replace(ctx: Any) -> None:
        number.write_text("2")
        (ctx.out / "number.txt").write_text("3")

    plan = plan_of((stage("s1", {"call": replace}, {"model": "model"}, Call),))
    plan = type(plan)(**{**vars(plan), "source": source})
    with pytest.raises(StageError, match="has changed since this run began"):
        run(tmp_path, plan)
    assert not list((tmp_path / "home" / "store").glob("*/*"))
