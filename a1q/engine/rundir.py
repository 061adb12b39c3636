"""The run folder: what a run was asked, what it used, what happened, what came out.

    recipe.yaml     the recipe, verbatim          resolved.yaml   composed, overridden, default-filled
    lock.json       digests, versions, machine    events.jsonl    every event but progress, appended
    report.json     rewritten after every stage   metrics/ID.jsonl  progress of one stage, a line each
    metrics/ID.csv  the same as a table, written when the stage ends, however it does
    export/ID/      copies of the packages        rules/ID/       copies of rules that a stage chose, to pin
    .lock           held while a run writes here

It listens to the run's events and needs to be told nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from a1q import __version__
from a1q.engine.artifact import MANIFEST, PROGRESS, RECORD, sha256_file
from a1q.engine.cachekey import package_versions
from a1q.engine.curve import as_csv
from a1q.engine.events import plain
from a1q.engine.files import copy_file, fsync_path, fsync_tree, home, remove_tree, told_disk_errors, write_atomic
from a1q.engine.locks import Lock, holder, try_lock
from a1q.engine.plan import Plan
from a1q.errors import A1QError, UsageError

REPORT = "report.json"
UNFINISHED = ("running", "interrupted", "failed")
STORE_FOLDERS = ("store", "tmp", "work", "locks", "text", "digests")
"""What the store and the data keep in `$A1Q_HOME`."""


class RunFolder:
    """One run folder, locked for as long as the instance is open."""

    def __init__(self, path: Path):
        """Create or reopen the folder and lock it.

        Raises:
            UsageError: if the folder can't be made, holds something else than a run, or belongs to the store.
            A1QError: if another run writes there now; the message says which process.
        """
        try:
            self.path = path.absolute()
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"{path} is a file; a run needs a folder")
            if _belongs_to_store(self.path):
                raise UsageError(f"{path} belongs to the store ({home()}); choose another folder with -o")
            if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / ".lock").exists():
                raise UsageError(f"{path} is neither empty nor the folder of a run; choose another with -o")
            lock = try_lock(self.path / ".lock", True)
        except OSError as error:
            raise UsageError(
                f"{path} can't be used as a run folder: {error.strerror}; choose another with -o"
            ) from error
        if lock is None:
            raise A1QError(f"process {holder(self.path / '.lock')} is running in {path}; one run at a time per folder")
        self._lock: Lock = lock
        self.previous = read_report(self.path) or {}
        """The report of the run that was here before, or an empty mapping."""
        self.parts: dict[str, Any] = read_keys(self.path)
        """Key parts by stage id of the runs that were here before."""
        self._plan: Plan | None = None
        self._report: dict[str, Any] = {}
        self._progress: IO[str] | None = None
        self._events: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._close_progress()
            if self._events is not None:
                self._events.close()
        finally:
            self._lock.release()

    @property
    def resumes(self) -> bool:
        """Whether the run that was here before didn't come to its end."""
        return self.previous.get("status") in UNFINISHED

    def begin(self, plan: Plan, **asked: Any) -> None:
        """Write what this run was asked and what it runs on, and start to record; `asked` goes to the report."""
        import yaml

        self._plan = plan
        write_atomic(self.path / "recipe.yaml", plan.recipe_text)
        resolved = yaml.safe_dump(plain(plan.resolved), sort_keys=False, allow_unicode=True, width=120)
        write_atomic(self.path / "resolved.yaml", resolved)
        self._report = {
            "name": plan.name,
            "seed": plan.seed,
            "status": "running",
            "smoke": plan.smoke,
            "recipe": plan.recipe_file,
            **asked,
            "error": None,
            "stages": [],
            "exports": {},
        }
        self._write()
        _register(self.path)
        for path in (self.path / "metrics").glob("*.jsonl"):
            _write_table(path)  # a killed run had no time to
        path = self.path / "events.jsonl"
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._events = path.open("a", encoding="utf-8")
        self._events.write("\n" if torn else "")

    def progress_file(self, stage_id: str) -> Path:
        """Where the progress of one stage is collected."""
        return self.path / "metrics" / f"{stage_id}.jsonl"

    # -- listening -----------------------------------------------------------------------------------------
    def __call__(self, event: Mapping[str, Any]) -> None:
        """Record one event.

        Raises:
            StageError: if the disk of the run folder is full.
        """
        with told_disk_errors(self.path):
            self._record(event)

    def _record(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress":
            self._record_progress(event)
            return
        assert self._events is not None
        self._events.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._events.flush()
        if kind == "stage_start":
            self._report["running"] = event["id"]
            self._write_report()
        elif kind == "stage_end":
            self._close_progress()
            self._end_stage(event)
            os.fsync(self._events.fileno())
        elif kind == "run_end":
            self._close_progress()
            self._report |= {name: event[name] for name in ("status", "error", "seconds")}
            if event["status"] in ("done", "gate failed"):
                self._report.pop("running", None)
            self._write()
            os.fsync(self._events.fileno())

    def _record_progress(self, event: Mapping[str, Any]) -> None:
        if self._progress is None:
            path = self.progress_file(event["id"])
            path.parent.mkdir(exist_ok=True)
            # A resumed stage repeats the steps after its checkpoint: each step stays once.
            earlier = list(read_lines(path))
            same = [index for index, line in enumerate(earlier) if _step(line) == _step(event)]
            earlier = earlier[: same[-1]] if same else earlier if event["step"] > 1 else []
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in earlier))
            self._progress = path.open("a", encoding="utf-8")
        line = {name: value for name, value in event.items() if name not in ("event", "id")}
        self._progress.write(json.dumps(line) + "\n")
        self._progress.flush()

    def _close_progress(self) -> None:
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.close()
            _write_table(Path(progress.name))

    def _end_stage(self, event: Mapping[str, Any]) -> None:
        artifact = Path(event["artifact"])
        progress = self.progress_file(event["id"])
        if event["cache"] == "hit":
            progress.unlink(missing_ok=True)
            if (artifact / PROGRESS).exists():
                progress.parent.mkdir(exist_ok=True)
                copy_file(artifact / PROGRESS, progress)
            _write_table(progress)
        if event["kind"] == "rules":
            export(artifact, self.path / "rules" / event["id"])
        if event["kind"] == "package":
            export(artifact, self.path / "export" / event["id"])
            self._report["exports"][event["id"]] = f"export/{event['id']}"
        self.parts[event["id"]] = read_json(artifact / RECORD)["key"]
        dropped = ("time", "event")
        self._report["stages"].append({name: value for name, value in event.items() if name not in dropped})
        self._report.pop("running", None)
        self._write()

    def _write(self) -> None:
        assert self._plan is not None
        write_atomic(self.path / "lock.json", json.dumps(self._lock_file(self._plan), indent=1, ensure_ascii=False))
        self._write_report()

    def _write_report(self) -> None:
        write_atomic(self.path / REPORT, json.dumps(self._report, indent=1, ensure_ascii=False))

    def _lock_file(self, plan: Plan) -> dict[str, Any]:
        source = plan.source
        return {
            "a1q": __version__,
            "model": {**plain(source.meta), "digest": source.digest} if source else None,
            "data": self._data_facts(plan),
            "runtime": plain(vars(plan.runtime)),
            "packages": {**package_versions(), "datasets": _version("datasets")},
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "keys": self.parts,
        }

    def _data_facts(self, plan: Plan) -> dict[str, Any]:
        facts = {}
        for stage in plan.stages:
            used = self.parts.get(stage.id, {}).get("data", {})
            for name, entry in stage.data.items():
                facts[name] = {
                    "source": entry.config.get("source") or entry.config.get("mix"),
                    "revision": entry.config.get("revision"),
                    "digest": used.get(name, {}).get("digest", entry.digest),
                }
        return facts


def export(artifact: Path, target: Path) -> None:
    """Make `target` hold exactly the artifact's files: copies or reflinks. A target that does already is left alone."""
    files = read_json(artifact / MANIFEST)["files"]
    if _holds(target, files):
        return
    aside = target.with_name(f".{target.name}.new")
    remove_tree(aside)
    for name in files:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(artifact / name, aside / name)
    fsync_tree(aside)
    remove_tree(target)
    aside.rename(target)
    fsync_path(target.parent)


def _holds(target: Path, files: Mapping[str, Any]) -> bool:
    there = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if not path.is_dir()}
    return set(there) == set(files) and all(
        path.stat().st_size == files[name]["size"] and sha256_file(path) == files[name]["sha256"]
        for name, path in there.items()
    )


def _belongs_to_store(folder: Path) -> bool:
    """Whether it is the store's own folder or one that the store fills and empties."""
    root, folder = home().resolve(), folder.resolve()
    return folder == root or any(root / name in (folder, *folder.parents) for name in STORE_FOLDERS)


def _write_table(progress: Path) -> None:
    """Make the .csv beside a .jsonl say what that says; without the one there isn't the other."""
    table = progress.with_suffix(".csv")
    if progress.is_file():
        write_atomic(table, as_csv(list(read_lines(progress))))
    else:
        table.unlink(missing_ok=True)


def _step(event: Mapping[str, Any]) -> tuple[Any, Any]:
    """What tells one line of progress from another; a stage of two phases counts to two totals."""
    return event.get("step"), event.get("total")


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a run folder, or None if it is none or damaged."""
    report = read_json(folder / REPORT)
    types = {"name": str, "status": str, "stages": list, "exports": dict}
    whole = all(isinstance(report.get(name), kind) for name, kind in types.items()) and "error" in report
    stages = report["stages"] if whole else ()
    fields = {"id", "stage", "cache", "seconds", "metrics", "key"}
    return report if whole and all(isinstance(item, dict) and fields <= set(item) for item in stages) else None


def read_keys(folder: Path) -> dict[str, Any]:
    """Key parts by stage id of the runs in a run folder; empty if its lock.json is missing or damaged."""
    keys = read_json(folder / "lock.json").get("keys")
    return {name: parts for name, parts in keys.items() if isinstance(parts, dict)} if isinstance(keys, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping from a file; empty if the file is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON mappings of a .jsonl file; a line torn by a kill is passed over."""
    if path.exists():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def known_runs() -> list[Path]:
    """Every run folder that exists and used this machine's store, oldest first."""
    notes = sorted((home() / "runs").glob("*.txt"), key=lambda path: path.stat().st_mtime)
    folders = []
    for note in notes:
        with contextlib.suppress(OSError, ValueError):  # no note of ours
            folders.append(Path(note.read_text(encoding="utf-8")))
    return [folder for folder in folders if (folder / REPORT).is_file() or (folder / "lock.json").is_file()]


def _register(folder: Path) -> None:
    """Note the run folder in the store, so that `a1q store gc` knows which artifacts it refers to."""
    note = home() / "runs" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.txt"
    with contextlib.suppress(OSError):  # a read-only store can still serve hits
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, str(folder))


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
