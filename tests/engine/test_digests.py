import os
from pathlib import Path

import pytest

from a1q.engine import digests
from a1q.engine.artifact import sha256_file
from a1q.engine.digests import content_digest, file_digest


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "home"))


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "large"
    path.write_bytes(b"x" * digests.REMEMBERED_FROM)
    expected = sha256_file(path)
    assert file_digest(path) == expected
    monkeypatch.setattr(digests, "sha256_file", lambda path: pytest.fail("read again"))
    assert file_digest(path) == expected


def test_a_changed_file_is_read_again(tmp_path: Path):
    path = tmp_path / "large"
    path.write_bytes(b"x" * digests.REMEMBERED_FROM)
    before = file_digest(path)
    path.write_bytes(b"y" * digests.REMEMBERED_FROM)
    os.utime(path, ns=(1, 1))
    assert file_digest(path) == sha256_file(path) != before


def test_a_damaged_record_costs_time_only(tmp_path: Path):
    path = tmp_path / "large"
    path.write_bytes(b"x" * digests.REMEMBERED_FROM)
    before = file_digest(path)
    for record in (tmp_path / "home" / "digests").iterdir():
        record.write_text('{"file": ')
    assert file_digest(path) == before


def test_an_unwritable_home_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "file" / "below"))
    path = tmp_path / "large"
    path.write_bytes(b"x" * digests.REMEMBERED_FROM)
    assert file_digest(path) == sha256_file(path)


def test_a_folders_digest_is_of_names_and_contents(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").write_text("1")
        (tmp_path / folder / "y").write_text("2")
    assert content_digest(tmp_path / "a", ["x", "y"]) == content_digest(tmp_path / "b", ["y", "x"])
    assert content_digest(tmp_path / "a", ["x"]) != content_digest(tmp_path / "b", ["y", "x"])
    (tmp_path / "b" / "y").write_text("3")
    assert content_digest(tmp_path / "a", ["x", "y"]) != content_digest(tmp_path / "b", ["x", "y"])
