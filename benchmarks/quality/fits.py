"""Fitted models kept for the cells that start from the same one: those that train at several learning rates.

They lie below `$A1Q_HOME/quality/fits` and may be deleted at any time. A fit that is taken from there brings its time
and its memory along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.module import QuantModule

RECORD = "record"


def place_of(parts: Mapping[str, Any]) -> Path:
    """Where the fit lies that hangs on `parts`."""
    from a1q.engine.artifact import canonical_json, sha256_bytes
    from a1q.engine.files import home

    return home() / "quality" / "fits" / f"{sha256_bytes(canonical_json(dict(parts)))}.safetensors"


def keep_fit(path: Path, modules: Mapping[str, QuantModule], record: Mapping[str, Any]) -> None:
    """Write the parts of fitted modules, and a JSON mapping beside them."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}|{part}": tensor.detach().contiguous()
        for name, module in modules.items()
        for part, tensor in module.parts().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, aside, {RECORD: json.dumps(record)})
    os.replace(aside, path)


def kept_fit(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Module name -> part -> tensor, and the record; None where nothing is kept."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            name, part = key.split("|")
            found.setdefault(name, {})[part] = file.get_tensor(key)
        return found, json.loads(file.metadata()[RECORD])
