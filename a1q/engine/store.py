"""The content-addressed store: artifacts by cache key, published whole or not at all, verified whenever used.

Below `root` (`$A1Q_HOME`): `store/KEY[:2]/KEY/` published, `tmp/KEY/` being written, `work/KEY/` scratch that survives
a kill, `locks/KEY` who computes (exclusive) or uses (shared) the key. Whoever holds a key's exclusive lock owns its
`tmp` and `work` folders, so what a killed process left there is recognised by its lock being free.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1q.engine.artifact import (
    BESIDE,
    MANIFEST,
    PROGRESS,
    RECORD,
    Artifact,
    canonical_json,
    digest_of,
    manifest_of,
    sha256_bytes,
    sha256_file,
)
from a1q.engine.files import copy_file, fsync_path, fsync_tree, home, remove_tree
from a1q.engine.locks import Lock, try_lock, wait_lock
from a1q.errors import A1QError, StageError

_KEY = re.compile(r"[0-9a-f]{64}")
_RECORD: dict[str, Any] = {"seconds": (int, float), "metrics": dict, "key": dict}
"""What a run reads of entry.json beside the digest."""


class DamagedError(A1QError):
    """An artifact on disk is not what was published: truncated, altered or incomplete."""


@dataclass(frozen=True)
class Entry:
    """One published artifact."""

    key: str
    artifact: Artifact
    record: Mapping[str, Any]


class Store:
    """The artifacts of one machine. An instance keeps a shared lock on every key it handed out until `close`."""

    def __init__(self, root: Path | None = None):
        self.root = root or home()
        self._held: dict[str, Lock] = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others replace or remove what this instance used."""
        for lock in self._held.values():
            lock.release()
        self._held.clear()

    # -- places --------------------------------------------------------------------------------------------
    def folder(self, key: str) -> Path:
        """Where the artifact of `key` is published."""
        return self.root / "store" / key[:2] / key

    def out(self, key: str) -> Path:
        """Where the artifact of `key` is being written."""
        return self.root / "tmp" / key

    def scratch(self, key: str) -> Path:
        """The checkpoints of an unfinished stage."""
        return self.root / "work" / key

    def shared(self, identity: Mapping[str, Any]) -> Path:
        """A folder among the scratch for what hangs on `identity` (JSON values) alone, whoever wants it."""
        folder = self.scratch(sha256_bytes(canonical_json(dict(identity))))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def lock_path(self, key: str) -> Path:
        """The lock file of `key`."""
        return self.root / "locks" / key

    def published(self) -> Iterator[str]:
        """All published keys, sorted."""
        for folder in sorted((self.root / "store").glob("??/*")):
            if _KEY.fullmatch(folder.name):
                yield folder.name

    # -- reading -------------------------------------------------------------------------------------------
    def acquire(
        self, key: str, should_stop: Callable[[], int], log: Callable[[str], None], force: bool = False
    ) -> Entry | None:
        """The verified artifact of `key`, or None: the caller must then compute it and `publish`.

        Another process that computes the same key is waited for. After None this instance holds the key alone, and
        `out(key)` is a new empty folder; a damaged artifact was named in the log and removed. With `force` an
        artifact that is there is left alone until `publish` replaces it.

        Raises:
            Interrupted: if a signal asks to stop while waiting.
            OSError: if there is no such artifact and the store can't be written.
        """

        def wait(pid: str) -> None:
            log(f"waiting for process {pid}, which uses the same artifact {key[:12]}")

        if not force:
            lock = wait_lock(self.lock_path(key), False, should_stop, wait)
            try:
                entry = read_entry(self.folder(key))
            except DamagedError:
                entry = None
            if entry is not None:
                self._held[key] = lock
                return entry
            lock.release()
        lock = wait_lock(self.lock_path(key), True, should_stop, wait)
        try:
            if not force and (entry := self._read_or_remove(key, log)) is not None:
                lock.share()
                self._held[key] = lock
                return entry
            remove_tree(self.out(key))
            self.out(key).mkdir(parents=True)
            self.scratch(key).mkdir(parents=True, exist_ok=True)
        except BaseException:
            lock.release()
            raise
        self._held[key] = lock
        return None

    def _read_or_remove(self, key: str, log: Callable[[str], None]) -> Entry | None:
        try:
            return read_entry(self.folder(key))
        except DamagedError as error:
            log(f"{error}; it is removed and built again")
            remove_tree(self.folder(key))
            return None

    # -- writing -------------------------------------------------------------------------------------------
    def publish(
        self, key: str, kind: str, meta: Mapping[str, Any], record: Mapping[str, Any], progress: Path | None = None
    ) -> Entry:
        """Check what the stage wrote to `out(key)`, make it durable, and move it to its place in one step.

        Raises:
            StageError: if the stage wrote nothing or something that can't be an artifact.
            OSError: if the disk is full; nothing is published then.
        """
        out = self.out(key)
        check_regular(out)
        manifest = manifest_of(kind, out, meta)
        if not manifest["files"]:
            raise StageError("the stage wrote no file, so there is nothing to publish")
        record = {**record, "digest": digest_of(manifest), "created": _now()}
        if progress is not None and progress.exists():
            copy_file(progress, out / PROGRESS)
        (out / MANIFEST).write_bytes(canonical_json(manifest))
        (out / RECORD).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        self.move_in(key)
        remove_tree(self.scratch(key))
        self._held[key].share()
        return Entry(key, Artifact(kind, self.folder(key), record["digest"], manifest["meta"]), record)

    def move_in(self, key: str) -> None:
        """Durably rename `out(key)` to `folder(key)`; the caller holds the key's exclusive lock."""
        target, old = self.folder(key), self.out(f"{key}.old")
        fsync_tree(self.out(key))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(old)
        if target.exists():
            target.rename(old)
        self.out(key).rename(target)
        fsync_path(target.parent)
        fsync_path(target.parent.parent)
        remove_tree(old)

    def abandon(self, key: str) -> None:
        """Forget what a failed stage wrote; its scratch stays, so that the same command resumes."""
        remove_tree(self.out(key))
        self.release(key)

    def release(self, key: str) -> None:
        """Let others have the key."""
        if key in self._held:
            self._held.pop(key).release()

    def try_own(self, key: str) -> bool:
        """Take the exclusive lock of a key if nobody uses it."""
        lock = try_lock(self.lock_path(key), True)
        if lock is not None:
            self._held[key] = lock
        return lock is not None

    def sweep(self) -> int:
        """Remove what killed processes left in `tmp`; return how many folders. Others' live folders stay."""
        count = 0
        for folder in sorted((self.root / "tmp").glob("*")):
            key = folder.name.removesuffix(".old")
            if _KEY.fullmatch(key) and key not in self._held and self.try_own(key):
                try:
                    remove_tree(folder)
                    count += 1
                finally:  # a lock kept here would make this very run wait for itself
                    self.release(key)
        return count


def read_entry(folder: Path) -> Entry | None:
    """The artifact in a published folder with every file checked by size and digest, or None if there is no folder.

    Raises:
        DamagedError: naming the artifact and the first file that differs.
    """
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        record = json.loads((folder / RECORD).read_bytes())
        kind, meta, digest = manifest["kind"], manifest["meta"], record["digest"]
        files = {name: (fact["size"], fact["sha256"]) for name, fact in manifest["files"].items()}
        if wrong := [name for name, types in _RECORD.items() if not isinstance(record[name], types)]:
            raise ValueError(f"{RECORD} has no usable {', '.join(wrong)}")
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DamagedError(f"artifact {folder} is damaged: its manifest can't be read ({reason})") from None
    if digest_of(manifest) != digest:
        raise DamagedError(f"artifact {folder} is damaged: {MANIFEST} differs from the digest in {RECORD}")
    for name in sorted((there - BESIDE) ^ set(files)):
        raise DamagedError(f"artifact {folder} is damaged: {name} is {'missing' if name in files else 'foreign'}")
    for name, (size, digest_of_file) in files.items():
        path = folder / name
        if path.stat().st_size != size:
            raise DamagedError(
                f"artifact {folder} is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
            )
        if sha256_file(path) != digest_of_file:
            raise DamagedError(f"artifact {folder} is damaged: the content of {name} differs from its digest")
    with contextlib.suppress(OSError):  # a store that can't be written can still be read
        os.utime(folder)  # when it was last used, for `a1q store gc --older-than`
    return Entry(folder.name, Artifact(kind, folder, digest, meta), record)


def check_regular(folder: Path) -> None:
    """Refuse what an artifact can't hold.

    Raises:
        StageError: on links, devices, or a file with one of the store's own names.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StageError(f"an artifact holds plain files only, and {name} is a link or a device")
        if name in BESIDE:
            raise StageError(f"the file name {name} belongs to the store; a stage can't write one")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
