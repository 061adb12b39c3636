"""Pack and unpack: equal on the other side, and nothing unsafe or damaged gets in."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from a1q.engine.run import run_plan
from a1q.engine.rundir import read_report
from a1q.engine.store import DamagedError, Store, read_entry
from a1q.engine.transfer import pack, unpack
from a1q.errors import A1QError, UsageError
from tests.engine.fakes import chain, plan_of


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))
    run_plan(plan_of(chain(1, 2)), tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert report is not None
    keys = [item["key"] for item in report["stages"]]
    pack(Store(), keys, tmp_path / "pack.tar")
    return keys, tmp_path / "pack.tar"


def test_unpacked_artifacts_are_hits_elsewhere(packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, archive = packed
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "elsewhere"))
    with Store() as store:
        assert unpack(store, archive) == dict.fromkeys(keys, True)
        assert unpack(store, archive) == dict.fromkeys(keys, False)
    run_plan(plan_of(chain(1, 2)), tmp_path / "other")
    report = read_report(tmp_path / "other")
    assert report is not None and [item["cache"] for item in report["stages"]] == ["hit", "hit"]
    assert not list((tmp_path / "elsewhere" / "tmp").iterdir())


def _rewrite(archive: Path, change: Any) -> Path:
    """The archive with every member passed through `change(info, data)`, which may return others."""
    target = archive.with_name("changed.tar")
    with tarfile.open(archive) as reader, tarfile.open(target, "w") as writer:
        for info in reader.getmembers():
            handle = reader.extractfile(info)
            assert handle is not None
            for made, data in change(info, handle.read()):
                made.size = len(data)
                writer.addfile(made, io.BytesIO(data))
    return target


def _named(name: str) -> Any:
    def change(info: tarfile.TarInfo, data: bytes) -> Any:
        return [(info, data), (tarfile.TarInfo(name.replace("KEY", info.name[:64])), b"x")]

    return change


def _link(info: tarfile.TarInfo, data: bytes) -> Any:
    link = tarfile.TarInfo(info.name[:64] + "/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return [(info, data), (link, b"")]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_named("../outside"), "does not belong"),
        (_named("/tmp/outside"), "does not belong"),
        (_named("KEY/../../outside"), "does not belong"),
        (_named("KEY/./x"), "does not belong"),
        (_named("readme.txt"), "does not belong"),
        (_named("KEY/extra.bin"), "extra.bin is foreign"),
        (_link, "does not belong"),
        (
            lambda info, data: [(info, data[:-1] + b"9")] if info.name.endswith("number.txt") else [(info, data)],
            "differs",
        ),
        (lambda info, data: [] if info.name.endswith("artifact.json") else [(info, data)], "without its artifact.json"),
        (lambda info, data: [] if info.name.endswith("number.txt") else [(info, data)], "number.txt is missing"),
        (lambda info, data: [], "holds no artifact"),
        (_named("KEY/number.txt/below"), "number.txt: Is a directory|is damaged"),
        (_named("KEY/" + "n" * 300), "File name too long"),
    ],
)
def test_what_does_not_belong_is_refused_and_nothing_of_it_published(
    packed: Any, tmp_path: Path, change: Any, text: str
) -> None:
    changed = _rewrite(packed[1], change)
    with Store(tmp_path / "elsewhere") as store, pytest.raises(A1QError, match=text):
        unpack(store, changed)
    assert not list((tmp_path / "elsewhere").rglob("outside"))
    assert list(Store(tmp_path / "elsewhere").published()) == []


def test_an_artifact_under_a_key_that_is_not_its_own_is_refused(packed: Any, tmp_path: Path) -> None:
    keys, archive = packed

    def only_first(info: tarfile.TarInfo, data: bytes) -> Any:
        first = info.name.startswith(keys[0])
        info.name = "0" * 64 + info.name[64:]
        return [(info, data)] if first else []

    with Store(tmp_path / "elsewhere") as store, pytest.raises(DamagedError, match="does not belong to its key"):
        unpack(store, _rewrite(archive, only_first))


@pytest.mark.parametrize("cut", [0, 100, 700, 3000])
def test_a_cut_archive_is_refused(packed: Any, tmp_path: Path, cut: int) -> None:
    archive = packed[1]
    archive.write_bytes(archive.read_bytes()[:cut])
    with Store(tmp_path / "elsewhere") as store, pytest.raises(A1QError):
        unpack(store, archive)
    for key in Store(tmp_path / "elsewhere").published():
        assert read_entry(store.folder(key)) is not None


def test_a_damaged_artifact_is_not_packed(packed: Any, tmp_path: Path) -> None:
    keys, _ = packed
    (Store().folder(keys[0]) / "number.txt").write_text("9")
    with pytest.raises(DamagedError, match=r"number\.txt"):
        pack(Store(), keys, tmp_path / "second.tar")
    assert not (tmp_path / "second.tar").exists()


def test_an_archive_that_promises_more_than_there_is_is_refused(tmp_path: Path) -> None:
    promise = tarfile.TarInfo(f"{'a' * 64}/artifact.json")
    promise.size = 10**15
    (tmp_path / "promise.tar").write_bytes(promise.tobuf())
    with Store(tmp_path / "elsewhere") as store, pytest.raises(A1QError, match=r"promise\.tar"):
        unpack(store, tmp_path / "promise.tar")


@pytest.mark.parametrize("target", ["run", "nowhere/pack.tar"])
def test_a_target_that_is_no_file_is_refused_by_name(packed: Any, tmp_path: Path, target: str) -> None:
    with pytest.raises(UsageError, match=f"{target} can't be written"):
        pack(Store(), packed[0], tmp_path / target)
