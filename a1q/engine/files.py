"""Files that survive a kill: write aside, fsync, rename; copies that never share bytes one could change."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from a1q.errors import StageError

_FICLONE = 0x40049409
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_NO_PATH = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def home() -> Path:
    """The folder of the store and of everything else a1q keeps: `$A1Q_HOME`, default `~/.cache/a1q`."""
    return Path(os.environ.get("A1Q_HOME") or Path.home() / ".cache" / "a1q").expanduser().absolute()


def fsync_path(path: Path) -> None:
    """Force one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Force every file and folder below and including `folder` to disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(place, name))
        fsync_path(Path(place))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file's whole content, so that a reader or a crash sees the old or the new one, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy bytes, as a reflink where the filesystem can (both files then own their content); never a hard link."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        if not _reflink(reader.fileno(), writer.fileno()):
            shutil.copyfileobj(reader, writer, 1 << 20)


def _reflink(reader: int, writer: int) -> bool:
    try:
        import fcntl

        fcntl.ioctl(writer, _FICLONE, reader)
    except (ImportError, OSError):
        return False
    return True


def remove_tree(path: Path) -> None:
    """Delete a folder, or what stands in its place, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def tree_size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def disk_error(error: BaseException | None, folder: Path) -> StageError | None:
    """What to tell the user when `error` (or its cause) is owed to a full or read-only disk or to a path that can't be;
    None when it isn't.

    Libraries written in Rust or C++ report a full disk as their own exception, so their text is read too.
    """
    if isinstance(error, OSError) and error.errno in _NO_ACCESS:
        return StageError(f"no access to {error.filename or folder}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in _NO_PATH:
        return StageError(f"can't use {error.filename or folder}: {error.strerror}")
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in _NO_SPACE or f"os error {errno.ENOSPC}" in str(error) or "No space left" in str(error):
            return StageError(
                f"no space left in {folder}: {free_bytes(folder):,} bytes free; nothing half-written was published. "
                "Free some space (`a1q store gc` tells what can go) or point A1Q_HOME elsewhere; "
                "the same command then goes on."
            )
        error = error.__cause__
    return None


@contextlib.contextmanager
def told_disk_errors(folder: Path) -> Iterator[None]:
    """Within the block, what `disk_error` explains is raised as a `StageError` about `folder`."""
    try:
        yield
    except OSError as error:
        if (told := disk_error(error, folder)) is None:
            raise
        raise told from error


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
