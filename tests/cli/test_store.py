"""`a1q store`: list, clean, pack, unpack."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from a1q.engine.store import Store
from tests.cli.support import PLUGIN, RECIPE, a1q, caches, report


@pytest.fixture(autouse=True)
def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("numbers.yaml").write_text(RECIPE)
    assert a1q("run", "numbers.yaml", "--plugin", PLUGIN).exit_code == 0


def keys() -> list[str]:
    return list(Store().published())


def test_ls_names_stages_and_runs(tmp_path: Path) -> None:
    shown = a1q("store", "ls")
    assert shown.exit_code == 0
    assert "4 artifacts" in shown.output and "package" in shown.output and "runs/numbers" in shown.output
    facts = json.loads(a1q("store", "ls", "--json").output)
    assert {item["stage"] for item in facts} == {"begin", "more", "check", "box"}
    assert all(item["runs"] == [str(tmp_path / "runs" / "numbers")] for item in facts)


def test_gc_says_first_and_deletes_only_what_no_run_refers_to(tmp_path: Path) -> None:
    a1q("run", "numbers.yaml", "--plugin", PLUGIN, "-o", "second", "--set", "stages.more.value=9")
    assert len(keys()) == 7
    assert "0 folders" in a1q("store", "gc").output
    shutil.rmtree("second")
    told = a1q("store", "gc")
    assert "3 folders" in told.output and "--delete does it" in told.output and len(keys()) == 7
    done = a1q("store", "gc", "--delete")
    assert "3 folders deleted" in done.output and len(keys()) == 4
    assert a1q("run", "numbers.yaml", "--plugin", PLUGIN).exit_code == 0
    assert caches(tmp_path / "runs" / "numbers") == ["hit"] * 4


def test_gc_by_age_and_what_is_in_use_stays(tmp_path: Path) -> None:
    old = time.time() - 10 * 86400
    first, second, *_ = keys()
    for key in (first, second):
        os.utime(Store().folder(key), (old, old))
    scratch = Store().scratch("0" * 64)
    scratch.mkdir(parents=True)
    os.utime(scratch, (old, old))
    with Store() as user:
        user.acquire(first, lambda: 0, print)
        os.utime(Store().folder(first), (old, old))
        done = a1q("store", "gc", "--older-than", "7", "--delete")
    assert "2 folders deleted" in done.output and "1 are in use now and stay" in done.output
    assert first in keys() and second not in keys() and not scratch.exists()


def test_pack_one_stage_and_unpack_it_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = a1q("store", "pack", "runs/numbers", "--stage", "more", "-o", "more.tar")
    assert packed.exit_code == 0 and "more (add)" in packed.output
    key = report(Path("runs/numbers"))["stages"][1]["key"]
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "elsewhere"))
    unpacked = a1q("store", "unpack", "more.tar")
    assert unpacked.exit_code == 0 and "unpacked" in unpacked.output and keys() == [key]
    assert "was here already" in a1q("store", "unpack", "more.tar").output
    a1q("run", "numbers.yaml", "--plugin", PLUGIN, "-o", "there")
    assert caches(Path("there")) == ["miss", "hit", "miss", "miss"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["pack", "nothing", "-o", "x.tar"], 2, "no keys in"),
        (["pack", "runs/numbers", "--stage", "moer", "-o", "x.tar"], 2, "it has begin, more, check, box"),
        (["unpack", "numbers.yaml"], 1, "is no archive of a1q"),
        (["unpack", "missing.tar"], 2, "does not exist"),
    ],
)
def test_mistakes(arguments: list[str], code: int, text: str) -> None:
    result = a1q("store", *arguments)
    assert result.exit_code == code and text in result.output and "Traceback" not in result.output
    assert not Path("x.tar").exists()
