"""An exported folder: `meta.json`, the packages it names, and the tokenizer's files.

`read_bundle` checks every package for being whole and for being what meta.json says, and reads their programs when
they are asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.coreml.metafile import read_meta
from a1q.errors import MismatchError, Problem

if TYPE_CHECKING:
    from a1q.coreml.reader import Package

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Bundle:
    """An exported folder that is whole."""

    folder: Path
    meta: Mapping[str, Any]
    packages: Mapping[str, Package]
    """By name of the part, in the order of `meta["parts"]`; a program is read when it is first looked up."""

    def part(self, name: str) -> Mapping[str, Any]:
        """The entry of one part in meta.json."""
        return next(part for part in self.meta["parts"] if part["name"] == name)

    @property
    def context(self) -> int:
        """Positions that the cache holds."""
        return int(self.meta["context"])

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        return int(self.meta["vocabulary"])


def read_bundle(path: Path) -> Bundle:
    """Check an exported folder.

    Args:
        path: the folder, or one of the packages inside.

    Raises:
        MismatchError: naming all that is missing, truncated or damaged, or a tokenizer that is not this model's.
    """
    if not path.exists():
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else ""
        raise MismatchError([Problem(f"there is no {path}", hint=hint)])
    folder = path.parent if path.suffix == ".mlpackage" else path
    meta = read_meta(folder)
    problems = [Problem(text) for part in meta["parts"] for text in _part_problems(folder, part, meta)]
    problems += [Problem(text) for text in _tokenizer_problems(folder, meta["vocabulary"])]
    if problems:
        raise MismatchError(problems)
    return Bundle(folder, meta, _Packages({part["name"]: folder / part["file"] for part in meta["parts"]}))


class _Packages(Mapping[str, "Package"]):
    """Packages by part, read when they are first asked for: a program holds all of its weights."""

    def __init__(self, paths: Mapping[str, Path]):
        self._paths = paths
        self._read: dict[str, Package] = {}

    def __getitem__(self, name: str) -> Package:
        if name not in self._read:
            from a1q.coreml.reader import read_package

            path = self._paths[name]
            try:
                self._read[name] = read_package(path)
            except Exception as error:  # a damaged program fails anywhere in coremltools, with any exception
                raise MismatchError(f"{path} can't be read back: {type(error).__name__}: {error}") from error
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _part_problems(folder: Path, part: Mapping[str, Any], meta: Mapping[str, Any]) -> list[str]:
    """What keeps a part from being whole and what meta.json says."""
    from a1q.coreml.interface import interface_problems
    from a1q.coreml.weightfile import check_weights, read_spec

    path = folder / part["file"]
    if not path.is_dir():
        return [f"part {part['name']} is missing: there is no {path}"]
    try:
        spec = read_spec(path)
        check_weights(path, spec)
    except (ValueError, OSError) as error:
        return [str(error)]
    return [f"{path} {text}" for text in interface_problems(spec, part, meta)]


def _tokenizer_problems(folder: Path, vocabulary: int) -> list[str]:
    """Whether the tokenizer beside the package, if there is one, has tokens that the package has not.

    Only its own vocabulary is asked: an added token may stand for what another model of the family takes (an image).
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return []
    from tokenizers import Tokenizer

    try:
        known = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=False)
    except Exception as error:  # tokenizers raises plain Exception
        return [f"{file} is damaged: {error}"]
    highest = max(known.values(), default=-1)
    if highest >= vocabulary:
        return [
            f"{file} does not match: it has tokens up to {highest}, the package's vocabulary ends at {vocabulary - 1}"
        ]
    return []
