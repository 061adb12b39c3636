"""What the tests of `kd` and `eval` share: tiny models as artifacts, a text, and stage contexts built by hand."""

import json
import random
from pathlib import Path

from a1q.data import prepare
from a1q.engine.artifact import Artifact, digest_of, manifest_of
from a1q.engine.config import build_config
from a1q.engine.stage import DataEntry, PlanContext, StageContext
from tests.tiny import TEXT, tiny_folder

WORDS = " ".join(TEXT).split()


def write_text(path: Path, documents=200) -> DataEntry:
    """A `data:` entry whose three sides all hold text."""
    pick = random.Random(0)
    lines = [json.dumps({"text": " ".join(pick.choices(WORDS, k=60))}) for _ in range(documents)]
    path.write_text("\n".join(lines), encoding="utf-8")
    config = {"source": str(path), "seq_len": 16, "holdout": 0.5}
    return DataEntry("text", config, prepare(config))


def model_artifact(folder: Path, seed=0, **changes) -> Artifact:
    """A tiny model as the recipe's `model:` would be."""
    tiny_folder(folder, seed, **changes)
    return as_artifact("model", folder, source=str(folder), revision=None)


def as_artifact(kind, folder, **meta) -> Artifact:
    return Artifact(kind, folder, digest_of(manifest_of(kind, folder, {})), meta)


def run_stage(stage, options, inputs, entry, folder: Path, **more) -> StageContext:
    """Run a stage the way the engine does, and return its context; `out` is FOLDER/out."""
    context = make_context(stage, options, inputs, entry, folder, **more)
    stage().run(context)
    return context


def make_context(stage, options, inputs, entry, folder: Path, seed=5, **more) -> StageContext:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        id="it",
        config=build_config(stage.Config, options),
        seed=seed,
        inputs=inputs,
        out=folder / "out",
        scratch=folder / "scratch",
        data={"text": entry},
        **more,
    )


def plan_stage(stage, options, views, seq_len=16):
    """Plan a stage; returns its outcome and its problems as (path, message, hint, is a mismatch)."""
    problems = []
    context = PlanContext(
        id="it",
        config=build_config(stage.Config, options),
        views=views,
        groups={},
        data={"text": DataEntry("text", {"source": "somewhere", "seq_len": seq_len})},
        report=lambda *problem: problems.append(problem),
    )
    return stage().plan(context), problems
