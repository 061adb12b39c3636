"""The cache key: a digest of everything that decides a stage's result, and of nothing else.

Digests stand for content, never for paths: a model folder or a text that moved gives the same key. Thread count,
processor and library builds do not enter; they stand in the run's lock.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from a1q.engine.artifact import Artifact, canonical_json, sha256_bytes
from a1q.engine.events import plain
from a1q.engine.plan import Plan, PlannedStage, stage_seed
from a1q.engine.stage import DataEntry

PACKAGES = ("coremltools", "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")
"""The packages whose version can change a result."""


@functools.cache
def package_versions() -> Mapping[str, str]:
    """Installed version of each of `PACKAGES`, local build tags included; read from metadata, nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def key_parts(
    plan: Plan, planned: PlannedStage, inputs: Mapping[str, Artifact | None], data: Mapping[str, DataEntry]
) -> dict[str, Any]:
    """What decides a stage's result, as JSON values; kept beside the artifact so that a miss can be explained."""
    return plain(
        {
            "type": planned.type,
            "version": planned.stage.version,
            "options": planned.options,
            "parts": planned.parts,
            "plugins": planned.plugins,
            "groups": {name: group.match for name, group in planned.groups.items()},
            "data": {name: _data_part(entry) for name, entry in data.items()},
            "inputs": {name: item.digest if item else None for name, item in inputs.items()},
            "seed": stage_seed(plan.seed, planned.id),
            "runtime": {"device": plan.runtime.device, "amp": plan.runtime.amp, "params": plan.runtime.params},
            "packages": {name: text.partition("+")[0] for name, text in package_versions().items()},
            "smoke": plan.smoke,
        }
    )


def key_of(parts: Mapping[str, Any]) -> str:
    """The key: hex sha256 of the parts as canonical JSON."""
    return sha256_bytes(canonical_json(parts))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths at which two key parts differ: why a stage runs again."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(set(old) | set(new))
        return [text for name in names for text in differences(old.get(name), new.get(name), f"{path}.{name}")]
    return [] if old == new else [path.lstrip(".")]


def _data_part(entry: DataEntry) -> dict[str, Any]:
    return {"digest": entry.digest, **_without_place(entry.config)}


def _without_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """A data entry but for names and places, which its digest stands for."""
    where = ("source", "revision", "mix", "parts")
    found = {name: value for name, value in config.items() if name not in where}
    if config.get("parts"):
        found["parts"] = [{**_without_place(part["entry"]), "weight": part["weight"]} for part in config["parts"]]
    return found
