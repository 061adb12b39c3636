"""Execute a plan: for each stage a cache key, then a verified hit from the store or a run that is published whole.

Nothing here knows what any stage does. What happened is told as events; see `a1q.engine.events`.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a1q.engine.artifact import Artifact
from a1q.engine.cachekey import differences, key_of, key_parts
from a1q.engine.events import Events, not_finite, plain
from a1q.engine.files import disk_error
from a1q.engine.follow import summons
from a1q.engine.plan import SOURCE, Plan, PlannedStage, stage_seed
from a1q.engine.selection import Selection
from a1q.engine.stage import DataEntry, StageContext
from a1q.engine.store import Entry, Store
from a1q.engine.world import ALONE, World
from a1q.errors import GateError, Interrupted, StageError


@dataclass
class Interpreter:
    """Runs the selected stages of one plan, in order."""

    plan: Plan
    store: Store
    events: Events
    should_stop: Callable[[], int] = lambda: 0
    force: bool = False
    """Run the stages asked for even if their artifacts are there."""
    spared: Collection[str] = ()
    """Keys that `force` leaves alone: an interrupted forced run has computed them already."""
    before: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Key parts of the last run in this folder by stage id, to say why a stage runs again."""
    world: World = ALONE
    """The processes that this one leads in parallel stages."""
    progress_file: Callable[[str], Path | None] = lambda stage_id: None
    """Where a listener collects a stage's progress; kept beside its artifact."""
    artifacts: dict[str, Artifact | None] = field(default_factory=dict)
    _data: dict[str, DataEntry] = field(default_factory=dict)

    def run(self, selection: Selection) -> None:
        """Go through the stages.

        Raises:
            GateError: after a stage whose artifact says that a gate failed, now or when it was computed.
            Interrupted: if a signal asked to stop; the same selection then resumes.
            StageError: if a stage failed or the disk is full.
        """
        self.artifacts[SOURCE] = self.plan.source
        for planned in selection.stages:
            if self.should_stop():
                raise Interrupted(self.should_stop())
            self.artifacts[planned.id] = self._stage(planned, self.force and planned.id in selection.asked)

    def _stage(self, planned: PlannedStage, force: bool) -> Artifact:
        started = time.monotonic()
        emit = _Emitter(self.events, planned.id)
        try:
            data = {name: self._prepared(entry) for name, entry in planned.data.items()}
            inputs = {
                name: self.artifacts[item] if isinstance(item, str) else item for name, item in planned.inputs.items()
            }
            parts = key_parts(self.plan, planned, inputs, data)
            key = key_of(parts)
            because = differences(self.before[planned.id], parts) if planned.id in self.before else []
            force = force and key not in self.spared
            self.events("stage_start", id=planned.id, stage=planned.type, key=key)
            entry = self.store.acquire(key, self.should_stop, emit.log, force)
            cache = "hit" if entry else "miss"
            if entry is None:
                self.events("stage_run", id=planned.id, because=because)
            entry = entry or self._compute(planned, key, parts, inputs, data, emit)
        except OSError as error:
            if (full := disk_error(error, self.store.root)) is None:
                raise
            raise full from error
        failed = list(entry.artifact.meta.get("failed_gates", ()))
        self.events(
            "stage_end",
            id=planned.id,
            stage=planned.type,
            seconds=round(time.monotonic() - started, 3),
            computed_seconds=entry.record["seconds"],
            cache=cache,
            metrics=entry.record["metrics"],
            key=key,
            digest=entry.artifact.digest,
            kind=entry.artifact.kind,
            artifact=str(entry.artifact.path),
            failed_gates=failed,
        )
        if failed and self.plan.smoke:
            emit.log(f"gates are not judged in a smoke run ({'; '.join(failed)})")
        elif failed:
            raise GateError(f"stage {planned.id}: {'; '.join(failed)}")
        return entry.artifact

    def _compute(
        self,
        planned: PlannedStage,
        key: str,
        parts: Mapping[str, Any],
        inputs: Mapping[str, Artifact | None],
        data: Mapping[str, DataEntry],
        emit: _Emitter,
    ) -> Entry:
        started = time.monotonic()
        seed = stage_seed(self.plan.seed, planned.id)
        _seed_generators(seed)
        context = StageContext(
            id=planned.id,
            config=planned.config,
            seed=seed,
            inputs=inputs,
            out=self.store.out(key),
            scratch=self.store.scratch(key),
            shared=lambda identity: self.store.shared({"stage": planned.type, **identity}),
            runtime=self.plan.runtime,
            groups=planned.groups,
            data=data,
            smoke=self.plan.smoke,
            world=self.world if planned.stage.parallel else ALONE,
            emit=emit,
            should_stop=self.should_stop,
        )
        try:
            _require_unchanged(inputs)
            if not context.world.alone:
                context.world.shared(summons(context))
            try:
                planned.stage.run(context)
            except SystemExit as error:
                raise StageError(f"stage {planned.id} asked the process to exit ({error})") from error
            _require_unchanged(inputs)
            metrics = plain(context.metrics)
            if odd := not_finite({"metrics": metrics, "meta": plain(context.meta)}):
                raise StageError(f"stage {planned.id}: {', '.join(odd)} came out as NaN or infinite")
            record = {"stage": planned.id, "type": planned.type, "metrics": metrics, "key": parts}
            record["seconds"] = round(time.monotonic() - started, 3)
            return self.store.publish(key, planned.output, plain(context.meta), record, self.progress_file(planned.id))
        except Exception as error:
            self.store.abandon(key)
            if (full := disk_error(error, self.store.root)) is not None:
                raise StageError(f"stage {planned.id}: {full}") from error
            error.add_note(f"in stage {planned.id} ({planned.type})")
            raise

    def _prepared(self, entry: DataEntry) -> DataEntry:
        """The entry with its content digest, which costs a download or an extraction the first time."""
        if entry.name not in self._data:
            if not entry.digest:
                from a1q.data import prepare

                entry = dataclasses.replace(entry, digest=prepare(entry.config))
            self._data[entry.name] = entry
        return self._data[entry.name]


@dataclass(frozen=True)
class _Emitter:
    """What a stage emits, with the stage's id added."""

    events: Events
    stage_id: str

    def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
        self.events(kind, **{**values, "id": self.stage_id})

    def log(self, message: str) -> None:
        self("log", {"message": message})


def _require_unchanged(inputs: Mapping[str, Artifact | None]) -> None:
    """Refuse a result made from a model folder that is no longer what the key says.

    Raises:
        StageError: naming the folder.
    """
    for artifact in inputs.values():
        if artifact is not None and artifact.digest_now is not None:
            try:
                unchanged = artifact.digest_now() == artifact.digest
            except FileNotFoundError:
                unchanged = False
            if not unchanged:
                raise StageError(f"{artifact.path} has changed since this run began; run the command again")


def _seed_generators(seed: int) -> None:
    """Seed the global generators that a stage may meet. A stage that computes with torch calls
    `a1q.training.device.prepare_torch` besides, which loads it; here it is only seeded if it is loaded."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
