"""Is a saved package whole? Its manifest, its program, and every weight that the program looks for in `weight.bin`.

coremltools reads past the end of a truncated weight file without a word, or crashes, so this is asked before it reads.
Layout of the file: 64 bytes of file header, then for every weight an entry of 64 bytes (sentinel, type, size and place
of the data, unused bits) at the offset that the program names. Format: MILBlob/Blob/StorageFormat.hpp of coremltools.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from a1q.coreml.toolkit import coremltools

SENTINEL = 0xDEADBEEF
ENTRY = struct.Struct("<IIQQQ")
"""Sentinel, type, bytes of data, offset of the data, bits of padding."""
ENTRY_BYTES = 64


@dataclass(frozen=True)
class Blob:
    """A weight that the program takes from a file."""

    operation: str
    """Name of the operation that holds it."""
    file: str
    """Name of the file in the folder `weights`."""
    offset: int
    """Of its entry."""
    bits: int
    """Of all its numbers together."""


def read_spec(path: Path) -> Any:
    """The model message (`coremltools.proto.Model_pb2.Model`) of an `.mlpackage`.

    Raises:
        ValueError: saying which file is missing or damaged.
    """
    manifest = path / "Manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        entry = content["itemInfoEntries"][content["rootModelIdentifier"]]
        file = path / "Data" / entry["path"]
    except FileNotFoundError:
        raise ValueError(f"{manifest} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} is damaged") from None
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    coremltools()
    from coremltools.proto.Model_pb2 import Model
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    spec = Model()
    try:
        spec.ParseFromString(file.read_bytes())
    except DecodeError:
        raise ValueError(f"{file} is truncated or damaged") from None
    if spec.WhichOneof("Type") != "mlProgram":
        raise ValueError(f"{file} holds no ML program; is it truncated?")
    return spec


def operations(spec: Any) -> Iterator[tuple[str, Any]]:
    """All operations as (function name, message)."""
    for name, function in spec.mlProgram.functions.items():
        for block in function.block_specializations.values():
            yield from ((name, operation) for operation in block.operations)


def blobs(spec: Any) -> Iterator[Blob]:
    """The weights that the program takes from files, once per operation."""
    from coremltools.proto import MIL_pb2

    for _, operation in operations(spec):
        bound = [b.value for argument in operation.inputs.values() for b in argument.arguments if b.HasField("value")]
        for value in [*operation.attributes.values(), *bound]:
            if value.WhichOneof("value") != "blobFileValue":
                continue
            tensor = value.type.tensorType
            size = math.prod(dimension.constant.size for dimension in tensor.dimensions)
            width = re.search(r"\d+", MIL_pb2.DataType.Name(tensor.dataType))
            where = value.blobFileValue
            name = operation.outputs[0].name if operation.outputs else operation.type
            yield Blob(name, where.fileName.rpartition("/")[2], where.offset, size * int(width[0] if width else 8))


def check_weights(path: Path, spec: Any) -> None:
    """Whether every weight of the program lies whole in its file.

    Raises:
        ValueError: naming the file, and the first weight that is not there.
    """
    weights = path / "Data" / "com.apple.CoreML" / "weights"
    by_file: dict[str, list[Blob]] = {}
    for blob in blobs(spec):
        by_file.setdefault(blob.file, []).append(blob)
    for name, found in by_file.items():
        file = weights / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        with file.open("rb") as stream:
            for blob in found:
                _check_entry(stream, file, blob)


def _check_entry(stream: BinaryIO, file: Path, blob: Blob) -> None:
    size = file.stat().st_size
    if blob.offset + ENTRY_BYTES > size:
        raise ValueError(f"{file} is truncated: {size:,} bytes, and {blob.operation} begins at {blob.offset:,}")
    stream.seek(blob.offset)
    sentinel, _, count, start, padding = ENTRY.unpack(stream.read(ENTRY.size))
    if sentinel != SENTINEL or 8 * count - padding != blob.bits:
        raise ValueError(f"{file} is damaged: at {blob.offset:,} there is no entry of {blob.operation}")
    if start + count > size:
        raise ValueError(f"{file} is truncated: {size:,} bytes, and {blob.operation} ends at {start + count:,}")
