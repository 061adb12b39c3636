"""The only place that opens a `.pt` file: tensors and plain values are read, nothing in it is ever executed."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

from a1q.errors import MismatchError, Problem

ZIP = b"PK\x03\x04"
"""How files of `torch.save` begin, but for its oldest format."""
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_pickled(path: Path) -> Any:
    """What `torch.save` wrote, tensors on the CPU; those of the zip format are mapped, not read, until they are used.

    Raises:
        MismatchError: if the file holds objects that would have to be made by running code (the message names their
            classes or functions), is cut or damaged, or is none of `torch.save`.
        OSError: if it can't be opened.
    """
    import torch

    with open(path, "rb") as file:
        mapped = file.read(len(ZIP)) == ZIP
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = sorted({*GLOBAL.findall(str(error)), *_wanted(path)})
        if not wanted:
            raise _damaged(path, error) from None
        message = f"{path} holds pickled objects that would execute code when they are read: {', '.join(wanted)}"
        hint = "a1q reads tensors and plain values only; where the file comes from, save `model.state_dict()` instead"
        raise MismatchError([Problem(message, hint=hint)]) from None
    except Exception as error:  # a damaged file fails in as many ways as there are types, OSError among them
        raise _damaged(path, error) from None


def _wanted(path: Path) -> list[str]:
    """Classes and functions that the file names beside harmless ones, as far as they can be listed."""
    import torch

    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # its oldest format can't be listed
        return []


def _damaged(path: Path, error: Exception) -> MismatchError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    message = f"{path} ({path.stat().st_size:,} bytes) is no whole file of torch.save ({reason})"
    return MismatchError([Problem(message, hint="copy it again, and compare its size with the original's")])
