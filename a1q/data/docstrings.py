"""Docstrings and help topics out of Python source files: parsed with `ast`, never imported, never executed."""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from a1q.errors import StageError

SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "__pycache__", "_vendor", "_vendored", "_bundled"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "lib2to3"}
TOPICS = "pydoc_data.topics"


@dataclass(frozen=True)
class Docstring:
    """One docstring or help topic as it stands in the source, dedented."""

    module: str
    """Qualified module name: what the split is made by."""
    name: str
    """Qualified name of the object; the module's own for a module."""
    kind: str
    """`module`, `class`, `function` or `topic`."""
    text: str


def source_files(dependencies: bool) -> Iterator[tuple[str, Path]]:
    """(module name, file) of the standard library and, if asked, of all that a1q depends on; sorted per package.

    Raises:
        StageError: if the standard library has no sources here, or a1q is not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = list(_library_files(root))
    if not found:
        raise StageError(f"the standard library has no source files in {root}; name a text of your own as `source`")
    yield from found
    if dependencies:
        for package in dependency_closure("a1q"):
            yield from _distribution_files(package)


def dependency_closure(name: str) -> list[Distribution]:
    """The installed distributions that `name` requires, directly or not, without extras; sorted by name.

    Raises:
        StageError: if `name` itself is not installed.
    """
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        current = _normal(waiting.pop())
        if current in found:
            continue
        try:
            found[current] = distribution(current)
        except PackageNotFoundError:
            if current == name:
                raise StageError(f"{name} is not installed, so its dependencies are unknown: pip install it") from None
            continue  # a requirement of another platform
        for requirement in found[current].requires or ():
            if not re.search(r"\bextra\s*==", requirement):
                waiting.append(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])
    found.pop(name)
    return [found[key] for key in sorted(found)]


def docstrings_of(module: str, path: Path) -> Iterator[Docstring]:
    """All docstrings of one file in source order; none if it can't be parsed. For pydoc's topics, the topics."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    if module == TOPICS:
        yield from _topics(tree)
    else:
        yield from _walk(tree, module, module)


def _library_files(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            module = _module_name(path.relative_to(root).parts)
            if module:
                yield module, path


def _distribution_files(package: Distribution) -> Iterator[tuple[str, Path]]:
    for item in sorted(package.files or (), key=str):
        module = _module_name(item.parts)
        if module and not SKIPPED_FOLDERS.intersection(item.parts):
            yield module, Path(str(item.locate()))


def _module_name(parts: tuple[str, ...]) -> str:
    """`("os", "path.py")` -> `os.path`; empty for what is no importable module (`test_x.py`, `x.txt`)."""
    if not parts[-1].endswith(".py") or parts[-1].startswith(("test_", "conftest")):
        return ""
    names = [*parts[:-1], parts[-1].removesuffix(".py")]
    if names[-1] in ("__init__", "__main__"):
        names.pop()
    return ".".join(names) if names and all(name.isidentifier() for name in names) else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _walk(node: ast.AST, module: str, name: str) -> Iterator[Docstring]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
            yield Docstring(module, name, kind, text)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, module, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _walk(child, module, name)


def _topics(tree: ast.Module) -> Iterator[Docstring]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield Docstring(f"{TOPICS}.{name}", f"{TOPICS}.{name}", "topic", topics[name])
