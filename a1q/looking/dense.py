"""How the tensors of a model that no scheme stores fit fp16: embeddings, dense linears, norms, adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from a1q.errors import MismatchError, StageError
from a1q.looking.numbers import Half, half_of, largest_of
from a1q.looking.tensors import ADAPTERS, EMBEDDINGS, LINEARS, OTHER, kind_of
from a1q.models.view import ModelView, weight_files

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """All tensors of one kind."""

    tensors: int
    not_finite: list[str]
    """Names of those with an infinite number or one that is none."""
    largest: float
    """The largest magnitude of a number that is finite."""
    half: Half


def dense_numbers(folder: Path, view: ModelView) -> dict[str, Dense]:
    """Kind of tensor, as `a1q.looking.tensors.bytes_by_kind` has it -> its numbers; one tensor in memory at a time.

    Raises:
        MismatchError: if a file is damaged.
    """
    names: dict[str, list[tuple[Path, str]]] = {kind: [] for kind in (EMBEDDINGS, LINEARS, OTHER, ADAPTERS)}
    try:
        for file in weight_files(folder):
            for name in _names(file):
                kind = kind_of(name, view)
                if kind in names:
                    names[kind].append((file, name))
    except StageError as error:
        raise MismatchError(str(error)) from None
    return {kind: _look(places) for kind, places in names.items() if places}


def _look(places: list[tuple[Path, str]]) -> Dense:
    odd, largest = [], 0.0

    def tensors() -> Iterator[Tensor]:
        nonlocal largest
        for file, name in places:
            tensor = _read(file, name)
            most, finite = largest_of(tensor)
            largest = max(largest, most)
            if not finite:
                odd.append(name)
            yield tensor

    half = half_of(tensors())
    return Dense(len(places), odd, largest, half)


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except SafetensorError as error:
        raise MismatchError(f"{file} is damaged: {error}") from None


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        found: Tensor = handle.get_tensor(name)
    return found
