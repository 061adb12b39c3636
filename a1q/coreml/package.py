"""Write a program as an `.mlpackage`: the same program gives the same bytes."""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from a1q.coreml.toolkit import SPECIFICATION, coremltools

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
"""The weight file in a package."""
NAMESPACE = uuid.UUID("6f2c6b51-6f0f-5b0e-9f0a-a1c0de000001")
"""Of the name-based identifiers in a package's manifest, where coremltools puts random ones."""

MORE = 1 << 20
"""Bytes that a disk must still take not to be called full."""


def write_package(program: Any, path: Path) -> None:
    """Serialize `program` to `path` (.mlpackage, must not exist).

    The program is written as it was built, through no optimization pass: `fuse_conv_scale` would make dense weights
    of palettized ones, `canonicalize_quantized_lut_pattern` a table per block, and cleaning is not needed.
    """
    ct = coremltools()
    from coremltools.converters.mil.backend.mil.load import load as lower

    # Weights are written beside the package and moved into it: given to save_spec, they would be copied.
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=path.parent) as folder:
        weights, nothing = Path(folder, "weights"), Path(folder, "nothing")
        weights.mkdir()
        nothing.mkdir()
        with _disk_errors_named(Path(folder)):
            model = lower(program, str(weights), specification_version=SPECIFICATION)
            ct.models.utils.save_spec(model, str(path), weights_dir=str(nothing))
        for file in weights.iterdir():
            file.replace((path / WEIGHTS).with_name(file.name))
    _make_reproducible(path, model)


@contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    """Find out what the system says where coremltools only says that it could not write: a full disk, say.

    Raises:
        OSError: if this folder takes no more bytes.
    """
    try:
        yield
    except RuntimeError:
        with (folder / "more").open("wb") as file:
            file.write(bytes(MORE))
            os.fsync(file.fileno())
        raise


def _make_reproducible(path: Path, model: Any) -> None:
    """Sort the protobuf's maps and name the manifest's items by their path."""
    manifest_file = path / "Manifest.json"
    manifest = json.loads(manifest_file.read_text())
    names = {old: str(uuid.uuid5(NAMESPACE, item["path"])) for old, item in manifest["itemInfoEntries"].items()}
    manifest["itemInfoEntries"] = {names[old]: item for old, item in manifest["itemInfoEntries"].items()}
    root = manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    manifest_file.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")
    model_file = path / "Data" / manifest["itemInfoEntries"][root]["path"]
    model_file.write_bytes(model.SerializeToString(deterministic=True))
