"""What only a Mac can do with a package: run it in Core ML, compile it, say where each operation would run.

Written after the API of coremltools 9.0 and tested against its signatures; none of it has been run on a Mac. Elsewhere
every entry raises `MismatchError` with the reason and the command to type on a Mac.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from a1q.coreml.toolkit import coremltools
from a1q.engine.files import fsync_path, fsync_tree, told_disk_errors
from a1q.errors import MismatchError, Problem, StageError

if TYPE_CHECKING:
    from a1q.coreml.bundle import Bundle
    from a1q.coreml.operations import Array

ComputeUnits = Literal["CPU_AND_NE", "ALL", "CPU_AND_GPU", "CPU_ONLY"]
COMPUTE_UNITS: tuple[ComputeUnits, ...] = ("CPU_AND_NE", "ALL", "CPU_AND_GPU", "CPU_ONLY")
"""What Core ML may use; names of `coremltools.ComputeUnit`."""
OLDEST_MACOS = 15
"""The first macOS that knows states and several functions in a package."""
STATEFUL = ("model", "ffn")
"""Roles of the parts that hold the cache."""
ENGINE, GPU, CPU, UNKNOWN = "NE", "GPU", "CPU", "unknown"


def available() -> str | None:
    """Why Core ML can't be used here; None if it can."""
    if sys.platform != "darwin":
        return f"Core ML runs on macOS only, and this is {platform.system()}"
    version = platform.mac_ver()[0]
    if int(version.partition(".")[0] or 0) < OLDEST_MACOS:
        return f"packages with states need macOS {OLDEST_MACOS}, and this is macOS {version}"
    coremltools()
    if importlib.util.find_spec("coremltools.libcoremlpython") is None:
        return "this coremltools has no native part (libcoremlpython); install it from a wheel for this Python"
    return None


def require(command: str) -> None:
    """Go on only where Core ML can be used.

    Args:
        command: what to type on a Mac instead.

    Raises:
        MismatchError: with the reason and the command.
    """
    if (reason := available()) is not None:
        raise MismatchError([Problem(reason, hint=f"on a Mac with macOS {OLDEST_MACOS} or later: {command}")])


class CoreMLBackend:
    """Core ML itself, as a `runner.Backend`. Models are loaded at their first use, which compiles them.

    Args:
        bundle: the exported folder.
        compute_units: what Core ML may use; one of `COMPUTE_UNITS`.

    Raises:
        MismatchError: where Core ML can't be used.
    """

    def __init__(self, bundle: Bundle, compute_units: ComputeUnits = "CPU_AND_NE"):
        require(f"a1q verify {bundle.folder} --against MODEL")
        self.name = f"Core ML, {compute_units}"
        self._parts = {part["name"]: part for part in bundle.meta["parts"]}
        self._folder = bundle.folder
        self._units = compute_units
        self._models: dict[tuple[str, str], Any] = {}

    def new_state(self) -> Any:
        """An empty cache (`MLState`), made by one function and passed to all: their states have the same name."""
        part = next(part for part in self._parts.values() if part["role"] in STATEFUL)
        with _told(f"{part['file']}: no state"):
            return self._model(part["name"], next(iter(part["functions"]))).make_state()

    def run(self, part: str, function: str, inputs: Mapping[str, Array], state: Any) -> dict[str, Array]:
        """Call one function; `state` is updated. Returns float32 outputs by name.

        Raises:
            StageError: with Core ML's own words, if it fails.
        """
        entry = self._parts[part]
        model = self._model(part, function)
        with _told(f"{entry['file']}, function {function}"):
            outputs = model.predict(dict(inputs), state=state if entry["role"] in STATEFUL else None)
        return {name: np.asarray(value, np.float32) for name, value in outputs.items()}

    def _model(self, part: str, function: str) -> Any:
        if (part, function) not in self._models:
            entry = self._parts[part]
            several = len(entry["functions"]) > 1
            path = self._folder / entry["file"]
            self._models[part, function] = _load(path, function if several else None, self._units)
        return self._models[part, function]


def _load(path: Path, function: str | None, compute_units: ComputeUnits) -> Any:
    """The `MLModel`; coremltools only warns when Core ML could not load it."""
    ct = coremltools()
    with warnings.catch_warnings(record=True) as heard, _told(str(path)):
        warnings.simplefilter("always")
        model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[compute_units], function_name=function)
    if model.__proxy__ is None:
        reason = "; ".join(str(warning.message) for warning in heard) or "its version is too new for this macOS"
        raise StageError(f"Core ML can't load {path}, function {function or 'main'}: {reason}")
    return model


# -- compiling -------------------------------------------------------------------------------------------------------
def compile_package(path: Path, out: Path | None = None) -> Path:
    """Compile an .mlpackage to `out` (.mlmodelc; default: beside it), all of it or nothing; an older one is replaced.

    Raises:
        MismatchError: where Core ML can't be used.
        StageError: with Core ML's own words, if it refuses the package.
    """
    require(f"a1q verify {path.parent} --against MODEL --compile")
    out = out or path.with_suffix(".mlmodelc")
    with told_disk_errors(out.parent), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        made = _compile(path, Path(aside))
        fsync_tree(made)
        if out.exists():
            os.rename(out, Path(aside, "older"))
        os.rename(made, out)
        fsync_path(out.parent)
    return out


def _compile(path: Path, folder: Path) -> Path:
    target = folder / path.with_suffix(".mlmodelc").name
    with _told(str(path)):
        return Path(coremltools().models.utils.compile_model(str(path), destination_path=str(target)))


# -- placement -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Placement:
    """Where Core ML means to run one operation."""

    function: str
    operation: str
    """Name of its first output."""
    type: str
    preferred: str
    """`NE`, `GPU`, `CPU`, or `unknown` where Core ML does not say."""
    supported: tuple[str, ...]
    cost: float | None
    """Estimated share of the function's work, 0 to 1; None where Core ML does not say."""


@dataclass(frozen=True)
class PlacementSummary:
    """Placements of several operations, by device."""

    operations: dict[str, int]
    share_of_operations: dict[str, float]
    share_of_cost: dict[str, float]
    """Of the cost that Core ML estimates; empty if it estimates none."""
    off_engine: dict[str, int]
    """Operation types placed elsewhere than on the Neural Engine, most frequent first."""


def placements(path: Path, compute_units: ComputeUnits = "CPU_AND_NE") -> list[Placement]:
    """Ask Core ML (`MLComputePlan`) where it would run every operation that is no constant.

    Core ML plans for the package's default function; for operations of others it may not say.

    Args:
        path: an .mlpackage, which is compiled for this, or an .mlmodelc.

    Raises:
        MismatchError: where Core ML can't be used.
        StageError: with Core ML's own words, if it refuses the package.
    """
    require(f"a1q verify {path.parent} --against MODEL")
    ct = coremltools()
    with tempfile.TemporaryDirectory(prefix="a1q-coreml-") as scratch:
        compiled = path if path.suffix == ".mlmodelc" else _compile(path, Path(scratch))
        with _told(str(path)):
            plan = ct.models.compute_plan.MLComputePlan.load_from_path(
                path=str(compiled), compute_units=ct.ComputeUnit[compute_units]
            )
            program = plan.model_structure.program
        if program is None:
            raise StageError(f"{path} is not an ML program")
        return [
            _placement(plan, name, operation)
            for name, function in program.functions.items()
            for operation in _operations(function.block)
            if not _type(operation).startswith("const")
        ]


def summarize(found: Iterable[Placement]) -> PlacementSummary:
    """Count placements by preferred device."""
    found = list(found)
    counts = Counter(placement.preferred for placement in found)
    costs = {
        device: sum(placement.cost or 0.0 for placement in found if placement.preferred == device) for device in counts
    }
    total = sum(costs.values())
    elsewhere = Counter(placement.type for placement in found if placement.preferred in (GPU, CPU))
    return PlacementSummary(
        operations=dict(counts),
        share_of_operations={device: count / len(found) for device, count in counts.items()},
        share_of_cost={device: cost / total for device, cost in costs.items()} if total else {},
        off_engine=dict(elsewhere.most_common()),
    )


def _placement(plan: Any, function: str, operation: Any) -> Placement:
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
    return Placement(
        function=function,
        operation=operation.outputs[0].name if operation.outputs else operation.operator_name,
        type=_type(operation),
        preferred=UNKNOWN if usage is None else _device(usage.preferred_compute_device),
        supported=() if usage is None else tuple(_device(device) for device in usage.supported_compute_devices),
        cost=None if cost is None else cost.weight,
    )


def _operations(block: Any) -> Iterator[Any]:
    """The operations of a block and of the blocks inside them."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _type(operation: Any) -> str:
    """`conv` of `ios18.conv`."""
    return re.sub(r"^ios\d+\.", "", operation.operator_name)


def _device(device: Any) -> str:
    kinds = coremltools().models.compute_device
    for kind, name in (
        (kinds.MLNeuralEngineComputeDevice, ENGINE),
        (kinds.MLGPUComputeDevice, GPU),
        (kinds.MLCPUComputeDevice, CPU),
    ):
        if isinstance(device, kind):
            return name
    return UNKNOWN


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Core ML's failures, of whatever type coremltools makes them, as a `StageError` that says where."""
    try:
        yield
    except OSError:
        raise  # a disk's affair
    except Exception as error:
        raise StageError(f"{place}: Core ML says: {error}") from error
