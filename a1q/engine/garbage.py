"""What can be deleted from the store: artifacts no run folder refers to, scratch nobody came back to."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from a1q.engine.cachekey import key_of
from a1q.engine.files import remove_tree, tree_size
from a1q.engine.rundir import known_runs, read_keys, read_report
from a1q.engine.store import Store

SCRATCH_DAYS = 30
"""How long checkpoints of an unfinished stage are kept."""
_DAY = 86400.0


@dataclass(frozen=True)
class Garbage:
    """A folder that may go."""

    key: str
    path: Path
    bytes: int
    reason: str


def references() -> dict[str, list[Path]]:
    """Cache key -> the run folders on this machine that refer to it."""
    found: dict[str, list[Path]] = {}
    for run in known_runs():
        keys = {key_of(parts) for parts in read_keys(run).values()}
        keys.update(item["key"] for item in (read_report(run) or {"stages": ()})["stages"])
        for key in keys:
            found.setdefault(key, []).append(run)
    return found


def find_garbage(store: Store, older_than: float | None = None) -> list[Garbage]:
    """Artifacts that no run folder refers to and scratch older than `SCRATCH_DAYS`; with `older_than` instead
    everything that was not used for so many days, whoever refers to it."""
    now = time.time()
    referred = references()
    found = []
    for key in store.published():
        folder = store.folder(key)
        age = (now - folder.stat().st_mtime) / _DAY
        if older_than is not None:
            if age > older_than:
                found.append(Garbage(key, folder, tree_size(folder), f"not used for {age:.0f} days"))
        elif key not in referred:
            found.append(Garbage(key, folder, tree_size(folder), "no run folder refers to it"))
    limit = SCRATCH_DAYS if older_than is None else older_than
    for folder in sorted((store.root / "work").glob("*")):
        age = (now - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))) / _DAY
        if re.fullmatch("[0-9a-f]{64}", folder.name) and age > limit:
            found.append(Garbage(folder.name, folder, tree_size(folder), f"scratch, untouched for {age:.0f} days"))
    return found


def remove_garbage(store: Store, items: Iterable[Garbage]) -> list[Garbage]:
    """Delete what nobody uses at this moment; returns what was deleted."""
    removed = []
    for item in items:
        if store.try_own(item.key):
            remove_tree(item.path)
            store.lock_path(item.key).unlink(missing_ok=True)
            store.release(item.key)
            removed.append(item)
    return removed
