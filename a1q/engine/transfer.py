"""Move artifacts between machines: a tar of published folders, every name and digest checked on the way in."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from a1q.engine.artifact import MANIFEST
from a1q.engine.cachekey import key_of
from a1q.engine.files import free_bytes, fsync_path, remove_tree, told_disk_errors
from a1q.engine.store import DamagedError, Entry, Store, read_entry
from a1q.errors import A1QError, UsageError

_NAME = re.compile(r"([0-9a-f]{64})/((?:[^/\\\0]+/)*[^/\\\0]+)")


def pack(store: Store, keys: Sequence[str], target: Path) -> list[Entry]:
    """Write the artifacts of `keys`, verified first, into one tar file.

    Raises:
        DamagedError: if an artifact isn't what was published; nothing is written then.
        UsageError: if `target` can't be a file.
        StageError: if the disk is full.
    """
    entries = []
    for key in keys:
        entry = read_entry(store.folder(key))
        if entry is None:
            raise A1QError(f"there is no artifact {key[:12]} in {store.root}")
        entries.append(entry)
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{target} can't be written: name a file in a folder that is there")
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with told_disk_errors(target.parent):
            _write(entries, aside)
            os.replace(aside, target)
            fsync_path(target.parent)
    finally:
        aside.unlink(missing_ok=True)
    return entries


def _write(entries: Sequence[Entry], target: Path) -> None:
    with tarfile.open(target, "w") as archive:
        for entry in entries:
            for path in sorted(entry.artifact.path.rglob("*")):
                if path.is_file():
                    name = f"{entry.key}/{path.relative_to(entry.artifact.path).as_posix()}"
                    archive.add(path, name, recursive=False, filter=_anonymous)
    fsync_path(target)


def _anonymous(item: tarfile.TarInfo) -> tarfile.TarInfo:
    item.uid = item.gid = 0
    item.uname = item.gname = ""
    item.mode = 0o644
    return item


def unpack(store: Store, source: Path) -> dict[str, bool]:
    """Publish the artifacts of a tar file that `pack` wrote: key -> whether it is new here.

    All names are checked before anything is written, and each artifact by its digests before it is published.

    Raises:
        DamagedError: if the file is no such archive, is cut, or holds what doesn't belong in one.
    """
    try:
        with told_disk_errors(store.root), tarfile.open(source, "r:") as archive:
            members = _members(archive, source)
            needed = sum(member.size for files in members.values() for member in files)
            if needed > free_bytes(store.root):
                raise A1QError(f"{source} needs {needed:,} bytes; {store.root} has {free_bytes(store.root):,} free")
            return {key: _unpack_one(store, archive, key, files) for key, files in members.items()}
    except (tarfile.TarError, EOFError, ValueError, OverflowError, OSError) as error:
        raise DamagedError(f"{source} is no archive of a1q, or is damaged: {error}") from None


def _members(archive: tarfile.TarFile, source: Path) -> dict[str, list[tarfile.TarInfo]]:
    members: dict[str, list[tarfile.TarInfo]] = {}
    for member in archive.getmembers():
        match = _NAME.fullmatch(member.name)
        if not member.isreg() or match is None or {".", ".."} & set(member.name.split("/")):
            raise DamagedError(f"{source} holds {member.name!r}, which does not belong in an archive of a1q")
        members.setdefault(match[1], []).append(member)
    if not members:
        raise DamagedError(f"{source} holds no artifact")
    for key, files in members.items():
        if f"{key}/{MANIFEST}" not in {member.name for member in files}:
            raise DamagedError(f"{source} holds artifact {key[:12]} without its {MANIFEST}")
    return members


def _unpack_one(store: Store, archive: tarfile.TarFile, key: str, files: list[tarfile.TarInfo]) -> bool:
    if store.acquire(key, lambda: 0, lambda text: None) is not None:
        store.release(key)
        return False
    try:
        for member in files:
            path = store.out(key) / member.name.partition("/")[2]
            path.parent.mkdir(parents=True, exist_ok=True)
            reader = archive.extractfile(member)
            assert reader is not None  # it is a regular file
            with reader, open(path, "wb") as writer:
                while block := reader.read(1 << 20):
                    writer.write(block)
        entry = read_entry(store.out(key))
        if entry is None or key_of(entry.record["key"]) != key:
            raise DamagedError(f"artifact {key[:12]} of the archive does not belong to its key")
        store.move_in(key)
        remove_tree(store.scratch(key))
    finally:
        store.abandon(key)
    return True
