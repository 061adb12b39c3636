"""An exported folder: `meta.json`, the packages it names, and the tokenizer's files.

`read_meta` reads and checks `meta.json` alone and imports nothing; `read_bundle` checks every package for being whole
and reads their programs when they are asked for.

| key of meta.json | value |
|---|---|
| `format` | 2 |
| `layout` | `single` or `anemll` |
| `model_type`, `vocabulary`, `eos_token_id` | of the model |
| `context`, `prefill` | positions that the cache holds, and that prefill takes at once |
| `state`, `outputs` | names of the state, and of the logits in order |
| `parts` | list of {name, file, role, functions: {name: positions}, layers: [first, end], theory_bytes} |
| `schemes`, `residual_scale`, `adapters` | schemes by module, factor of the residual stream, names of adapters |
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a1q.errors import MismatchError, Problem

if TYPE_CHECKING:
    from a1q.coreml.reader import Package

FORMAT = 2
META = "meta.json"
LAYOUTS = ("single", "anemll")
TOKENIZER = "tokenizer.json"
WITH_LOGITS = ("model", "lm_head")
"""Roles of the parts whose outputs are the logits."""
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "layout": str, "model_type": str, "context": int, "prefill": int, "vocabulary": int, "state": str,
    "outputs": list, "parts": list,
}  # fmt: skip
_PART_ENTRIES: dict[str, type] = {"name": str, "file": str, "role": str, "functions": dict, "layers": list}


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


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta.json` of an exported folder.

    Raises:
        MismatchError: if it is missing, damaged, or of a format or layout that this a1q does not know.
    """
    file = folder / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "take the whole folder that `export: {format: coreml}` wrote"
        message = f"{folder} has no {META}, which says how a Core ML package is run"
        raise MismatchError([Problem(message, hint=hint)]) from None
    except (OSError, ValueError) as error:
        raise MismatchError(f"{file} can't be read: {error}") from None
    if not isinstance(meta, dict):
        raise MismatchError(f"{file} is damaged: it is no mapping")
    if meta.get("format") != FORMAT:
        hint = "export the model again with this a1q"
        raise MismatchError(
            [Problem(f"{file} has format {meta.get('format')!r}; this a1q reads format {FORMAT}", hint=hint)]
        )
    if meta.get("layout") not in LAYOUTS:
        raise MismatchError(f"{file} has the layout {meta.get('layout')!r}; this a1q knows {', '.join(LAYOUTS)}")
    missing = _missing(meta, _ENTRIES, "")
    for index, part in enumerate(meta["parts"] if isinstance(meta.get("parts"), list) else []):
        missing += _missing(part if isinstance(part, dict) else {}, _PART_ENTRIES, f"parts[{index}].")
    if missing or not meta["parts"]:
        raise MismatchError(f"{file} is damaged: {', '.join(missing) or 'parts'} is missing or of another type")
    return meta


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
    problems = [Problem(text) for part in meta["parts"] for text in _part_problems(folder, part, meta["outputs"])]
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


def _missing(entries: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> list[str]:
    return [prefix + key for key, kind in wanted.items() if not isinstance(entries.get(key), kind)]


def _part_problems(folder: Path, part: Mapping[str, Any], outputs: Sequence[str]) -> list[str]:
    """What keeps a part from being whole."""
    from a1q.coreml.weightfile import check_weights, read_spec

    path = folder / part["file"]
    if not path.is_dir():
        return [f"part {part['name']} is missing: there is no {path}"]
    try:
        spec = read_spec(path)
        check_weights(path, spec)
    except (ValueError, OSError) as error:
        return [str(error)]
    functions = spec.mlProgram.functions
    found = [
        f"{path} has no function {name}, which {META} names" for name in sorted({*part["functions"]} - {*functions})
    ]
    if part["role"] in WITH_LOGITS:
        given = {name for f in functions.values() for name in f.block_specializations[f.opset].outputs}
        found += [f"{path} has no output {name}, which {META} names" for name in outputs if name not in given]
    return found


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
