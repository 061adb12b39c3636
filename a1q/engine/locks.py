"""Advisory file locks (flock): they vanish with their process, so nothing has to be cleaned up after a kill."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from a1q.errors import Interrupted

POLL_SECONDS = 0.1


class Lock:
    """A lock that is held. `exclusive` admits one holder, shared any number of readers."""

    def __init__(self, path: Path, handle: int | None):
        self.path = path
        self._handle = handle

    def share(self) -> None:
        """Let readers in: turn an exclusive lock into a shared one."""
        if self._handle is not None:
            fcntl.flock(self._handle, fcntl.LOCK_SH)

    def release(self) -> None:
        """Give the lock up; harmless when done twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def try_lock(path: Path, exclusive: bool) -> Lock | None:
    """Take the lock if it is free now, else return None.

    A shared lock in a folder that can't be written is granted without one: nobody can change anything there.

    Raises:
        OSError: if an exclusive lock's file can't be created.
    """
    while True:
        handle = _open(path, exclusive)
        if handle is None:
            return Lock(path, None)
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise
        if _same_file(handle, path):
            break
        os.close(handle)  # its file was deleted between open and lock: lock the new one
    if exclusive:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    return Lock(path, handle)


def wait_lock(path: Path, exclusive: bool, should_stop: Callable[[], int], on_wait: Callable[[str], None]) -> Lock:
    """Take the lock, waiting for it if need be; `on_wait(pid)` is called once when there is a wait.

    Raises:
        Interrupted: if a signal asks to stop while waiting.
    """
    told = False
    while (lock := try_lock(path, exclusive)) is None:
        if not told:
            on_wait(holder(path))
            told = True
        if should_stop():
            raise Interrupted(should_stop())
        time.sleep(POLL_SECONDS)
    return lock


def holder(path: Path) -> str:
    """Process id of the last exclusive holder, or `?`."""
    try:
        return path.read_text().strip() or "?"
    except OSError:
        return "?"


def _open(path: Path, exclusive: bool) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if exclusive or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY)
    return None


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
