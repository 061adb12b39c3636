"""A training stage in several processes: `python -m tests.training.several ASKED.json`, each told who it is.

Every process writes what it saw to `seen-RANK.json`: the losses of all steps and the first step's gradients.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from a1q.engine.artifact import Artifact
from a1q.engine.stage import Runtime
from a1q.engine.world import joined, world_here


def run(
    count: int,
    folder: Path,
    inputs: Mapping[str, Artifact],
    *,
    stage: str = "train",
    shard: bool = False,
    dies: tuple[int, int] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Run a stage in `count` processes and return what each saw; with `dies` (rank, step) that process kills itself,
    and exit codes are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: [item.kind, str(item.path), item.digest, dict(item.meta)] for name, item in inputs.items()}
    asked = {"stage": stage, "folder": str(folder), "inputs": told, "options": options, "shard": shard, "dies": dies}
    (folder / "asked.json").write_text(json.dumps(asked))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.training.several", str(folder / "asked.json")]
    processes = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}) for rank in range(count)]
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if dies:
        return [{"code": code} for code in codes]
    assert codes == [0] * count
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(count)]


def main(asked: Mapping[str, Any]) -> None:
    """One of the processes."""
    import torch

    from a1q.errors import StageError
    from a1q.training import together
    from a1q.training.loop import LoopSpec
    from tests.training.student import run_stage, stage_context

    world, folder = world_here(), Path(asked["folder"])
    seen: dict[str, Any] = {"losses": [], "tunes": [], "logs": []}
    inputs = {name: Artifact(kind, Path(path), *more) for name, (kind, path, *more) in asked["inputs"].items()}
    ctx = stage_context(asked["stage"], folder, inputs, **asked["options"])
    ctx = dataclasses.replace(ctx, world=world, runtime=Runtime(threads=1, shard=asked["shard"]))

    def emit(kind: str, values: Mapping[str, Any]) -> None:
        if kind == "progress":
            seen["losses"].append(values.get("loss"))
            seen["tunes"].append(values.get("tune"))
            if asked["dies"] == [world.rank, values["step"]]:
                os.kill(os.getpid(), signal.SIGKILL)
        else:
            seen["logs"].append(values["message"])

    ctx.emit = emit
    of = LoopSpec.of
    often = patch.object(LoopSpec, "of", lambda *args, **more: of(*args, **{**more, "checkpoint_steps": 3}))
    norm_of = {kind: kind.norm for kind in (together.Together, together.Shards)}

    def watched(self: together.Together, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        found = norm_of[together.Shards if isinstance(self, together.Shards) else together.Together](self, gradients)
        if "gradients" not in seen:
            seen["gradients"] = [self.whole(gradient).flatten().tolist() for gradient in gradients]
        return found

    with (
        often,
        joined(world, "cpu"),
        patch.multiple(together.Together, norm=watched),
        patch.multiple(together.Shards, norm=watched),
    ):
        try:
            run_stage(ctx)
        except StageError as error:
            print(f"process {world.rank}: {error}", file=sys.stderr)
            os._exit(1)
    seen["metrics"] = ctx.metrics
    (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
