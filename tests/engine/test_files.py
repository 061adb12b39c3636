"""Writing, copying, and telling what is wrong with a disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from a1q.engine.files import copy_file, disk_error, free_bytes, home, tree_size, write_atomic


def test_home_is_the_environment_or_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A1Q_HOME", str(tmp_path / "x"))
    assert home() == tmp_path / "x"
    monkeypatch.delenv("A1Q_HOME")
    assert home() == Path.home() / ".cache" / "a1q"


def test_a_write_that_fails_leaves_the_old_text_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "report.json", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "report.json", "new")
    assert (tmp_path / "report.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_copy_is_a_file_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert (tmp_path / "target").stat().st_ino != source.stat().st_ino
    before = source.read_bytes()
    (tmp_path / "target").write_bytes(b"changed")
    assert source.read_bytes() == before
    assert tree_size(tmp_path) == 3_000_007


def _raised_from(cause: Exception) -> Exception:
    try:
        raise RuntimeError("the checkpoint can't be written") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left in"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left in"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left in"),
        (_raised_from(OSError(errno.ENOSPC, "No space left on device")), "no space left in"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "no access to /x/y: Permission denied"),
        (OSError(errno.ENOTDIR, "Not a directory", "/x/y"), "can't use /x/y: Not a directory"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "no access to /x/y: Read-only file system"),
    ],
)
def test_disk_errors_are_told_in_our_words(tmp_path: Path, error: Exception, text: str) -> None:
    told = disk_error(error, tmp_path)
    assert told is not None and text in str(told) and told.exit_code == 1


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_other_errors_are_left_alone(tmp_path: Path, error: Exception) -> None:
    assert disk_error(error, tmp_path) is None


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0
