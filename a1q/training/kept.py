"""Models that training keeps on its way: `keep_every`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from a1q.engine.files import fsync_path, fsync_tree, remove_tree

FOLDER = "steps"


class KeptSteps:
    """Whole model folders, `steps/step-NNNNNNNN`: durable in the stage's scratch, at the end in its artifact."""

    def __init__(self, scratch: Path, write: Callable[[Path], None]):
        """Take what writes the model as it is now into a folder."""
        self._folder, self._write = scratch / FOLDER, write

    def keep(self, step: int) -> None:
        """Keep the model of a step; one that is there is written anew."""
        target = self._folder / f"step-{step:08d}"
        aside = target.with_suffix(".tmp")
        remove_tree(aside)
        aside.mkdir(parents=True)
        self._write(aside)
        fsync_tree(aside)
        remove_tree(target)
        aside.rename(target)
        fsync_path(self._folder)

    def publish(self, out: Path) -> None:
        """Copy what was kept into an artifact; the scratch goes when that is published."""
        for folder in sorted(self._folder.glob("step-????????")):
            shutil.copytree(folder, out / FOLDER / folder.name)
