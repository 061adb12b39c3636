"""Publication, verification, sweeping, and processes that meet at one key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from a1q.engine.artifact import canonical_json, sha256_bytes
from a1q.engine.locks import try_lock
from a1q.engine.store import DamagedError, Entry, Store, read_entry
from a1q.errors import Interrupted
from tests.engine.fakes import Add, caches, chain, execute, plan_of

KEY = sha256_bytes(b"some key")
RECORD = {"stage": "s1", "type": "add", "seconds": 1.0, "metrics": {}, "key": {}}


def never() -> int:
    return 0


def publish(store: Store, key: str = KEY, **files: str) -> Entry:
    assert store.acquire(key, never, print) is None
    for name, text in (files or {"number": "1"}).items():
        (store.out(key) / "deep").mkdir(exist_ok=True)
        (store.out(key) / "deep" / name).write_text(text)
    return store.publish(key, "model", {"a": 1}, RECORD)


def test_published_artifact_is_read_back_with_its_digest(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        made = publish(store)
    with Store(tmp_path) as other:
        read = other.acquire(KEY, never, print)
    assert read is not None
    assert read.artifact == made.artifact
    manifest = json.loads((read.artifact.path / "artifact.json").read_bytes())
    assert read.artifact.digest == sha256_bytes(canonical_json(manifest))
    assert not store.out(KEY).exists() and not store.scratch(KEY).exists()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: _flip(folder / "deep" / "number"), "the content of deep/number differs"),
        (lambda folder: (folder / "deep" / "number").write_text(""), "deep/number has 0 bytes instead of 5"),
        (lambda folder: (folder / "deep" / "number").unlink(), "deep/number is missing"),
        (lambda folder: (folder / "more").write_text("x"), "more is foreign"),
        (lambda folder: (folder / "artifact.json").write_text("{"), "manifest can't be read"),
        (lambda folder: (folder / "artifact.json").write_text("[]"), "manifest can't be read"),
        (lambda folder: (folder / "entry.json").unlink(), "manifest can't be read"),
        (
            lambda folder: (folder / "artifact.json").write_text(
                (folder / "artifact.json").read_text().replace('"model"', '"other"')
            ),
            "artifact.json differs",
        ),
        (lambda folder: _edit(folder / "entry.json", seconds=None), "entry.json has no usable seconds"),
        (lambda folder: _edit(folder / "entry.json", metrics=5), "entry.json has no usable metrics"),
        (lambda folder: _edit(folder / "artifact.json", files=5), "manifest can't be read"),
        (lambda folder: (folder / "artifact.json").write_text("[" * 100_000), "manifest can't be read"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("a file")), "manifest can't be read"),
    ],
)
def test_every_damage_is_named_and_the_artifact_is_built_again(tmp_path: Path, damage: Any, text: str) -> None:
    with Store(tmp_path) as store:
        folder = publish(store, number="12345").artifact.path
    damage(folder)
    with pytest.raises(DamagedError, match=text):
        read_entry(folder)
    told: list[str] = []
    with Store(tmp_path) as store:
        assert store.acquire(KEY, never, told.append) is None
    assert text in told[0] and "built again" in told[0]
    assert not folder.exists()


def test_a_flipped_bit_reruns_that_stage_and_nothing_that_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    plan = plan_of(chain(1, 2, 3))
    events = execute(plan, tmp_path / "home", tmp_path / "run")
    second = next(Path(event["artifact"]) for event in events if event.get("id") == "s2" and "artifact" in event)
    _flip(second / "number.txt")
    events = execute(plan, tmp_path / "home", tmp_path / "run")
    assert caches(events) == {"s1": "hit", "s2": "miss", "s3": "hit"}
    assert any("number.txt differs" in event.get("message", "") for event in events)
    assert (second / "number.txt").read_text() == "3"


def test_force_replaces_what_is_there(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        publish(store, number="old")
    with Store(tmp_path) as store:
        assert store.acquire(KEY, never, print, force=True) is None
        assert (store.folder(KEY) / "deep" / "number").read_text() == "old"
        (store.out(KEY) / "number").write_text("new")
        store.publish(KEY, "model", {}, RECORD)
    entry = read_entry(store.folder(KEY))
    assert entry is not None and (entry.artifact.path / "number").read_text() == "new"
    assert os.listdir(tmp_path / "tmp") == []


def test_sweep_leaves_what_a_living_process_writes(tmp_path: Path) -> None:
    dead, alive = sha256_bytes(b"dead"), sha256_bytes(b"alive")
    with Store(tmp_path) as writer, Store(tmp_path) as sweeper:
        writer.acquire(alive, never, print)
        writer.out(dead).mkdir()
        (tmp_path / "tmp" / "text-123").mkdir()
        assert sweeper.sweep() == 1
        assert writer.out(alive).is_dir() and (tmp_path / "tmp" / "text-123").is_dir()
        assert not writer.out(dead).exists()


def test_a_second_process_waits_for_the_first_and_takes_its_result(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from a1q.engine.store import Store\n"
        "store = Store(Path(sys.argv[1])); key = sys.argv[2]\n"
        "entry = store.acquire(key, lambda: 0, lambda text: None)\n"
        "print('computing' if entry is None else 'hit ' + (entry.artifact.path / 'pid').read_text(), flush=True)\n"
        "if entry is None:\n"
        "    time.sleep(0.5); import os; (store.out(key) / 'pid').write_text(str(os.getpid()))\n"
        "    store.publish(key, 'model', {}, {'seconds': 0, 'metrics': {}, 'key': {}})\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), KEY], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [run.communicate(timeout=60)[0].strip() for run in runs]
    assert sorted(text.split()[0] for text in said) == ["computing", "hit", "hit"]
    winner = str(next(run.pid for run, text in zip(runs, said, strict=True) if text == "computing"))
    assert {text.split()[1] for text in said if text != "computing"} == {winner}
    assert read_entry(Store(tmp_path).folder(KEY)) is not None


def test_waiting_for_a_key_can_be_interrupted_and_says_for_whom(tmp_path: Path) -> None:
    told: list[str] = []
    with Store(tmp_path) as holder, Store(tmp_path) as waiting:
        holder.acquire(KEY, never, print)
        end = time.monotonic() + 0.3
        with pytest.raises(Interrupted):
            waiting.acquire(KEY, lambda: 2 if time.monotonic() > end else 0, told.append)
    assert told == [f"waiting for process {os.getpid()}, which uses the same artifact {KEY[:12]}"]


def test_a_store_that_cannot_be_written_serves_hits_and_refuses_misses(tmp_path: Path) -> None:
    """In another process, as a user without rights (root may write anywhere)."""
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp())
    try:
        with Store(place / "home") as store:
            publish(store)
        shutil.rmtree(place / "home" / "locks")
        for folder in (place, place / "home", *(path for path in (place / "home").rglob("*") if path.is_dir())):
            folder.chmod(0o555)
        root = Path(__file__).resolve().parents[2]
        code = (
            "import os, sys; from pathlib import Path; from a1q.engine.store import Store\n"
            "if os.geteuid() == 0: os.setuid(65534)\n"
            f"store = Store(Path(sys.argv[1])); print(store.acquire('{KEY}', lambda: 0, print) is not None)\n"
            "try: store.acquire('0' * 64, lambda: 0, print)\n"
            "except PermissionError: print('refused')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(place / "home")], capture_output=True, text=True, cwd=root, timeout=60
        )
        assert done.stdout.split() == ["True", "refused"], done.stderr
    finally:
        for folder in (place, *(path for path in place.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        shutil.rmtree(place)


def test_lock_survives_the_deletion_of_its_file(tmp_path: Path) -> None:
    first = try_lock(tmp_path / "lock", True)
    assert first is not None and try_lock(tmp_path / "lock", False) is None
    (tmp_path / "lock").unlink()
    second = try_lock(tmp_path / "lock", True)
    assert second is not None and try_lock(tmp_path / "lock", True) is None
    first.release()
    second.release()


@pytest.fixture(autouse=True)
def _clear() -> None:
    Add.ran.clear()


def test_a_sweep_that_fails_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise PermissionError("not yours")

    (tmp_path / "tmp" / KEY).mkdir(parents=True)
    with Store(tmp_path) as store:
        with monkeypatch.context() as patch, pytest.raises(PermissionError):
            patch.setattr("a1q.engine.store.remove_tree", broken)
            store.sweep()
        assert try_lock(store.lock_path(KEY), True) is not None


def test_a_file_in_the_place_of_a_folder_is_swept(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / f"{KEY}.old").write_text("what stood where an artifact belongs")
    with Store(tmp_path) as store:
        assert store.sweep() == 1
        publish(store)
