"""Find stages, schemes and exporters by name: built-ins by file name, plug-ins by entry point or `--plugin FILE`.

Listing names and reading schemas imports no plug-in code of the built-ins, so `validate` and `--help` stay light.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from a1q.engine.artifact import sha256_file
from a1q.engine.exporter import Exporter
from a1q.engine.stage import Stage
from a1q.errors import UsageError
from a1q.quant.scheme import Scheme

ROOT = Path(__file__).resolve().parent.parent
"""The installed `a1q` package; `schemas/` and `exporters/` are reached through it."""


@dataclass(frozen=True)
class Family:
    """One kind of plug-in."""

    name: str
    module: str
    base: type


FAMILIES = {
    "stages": Family("stages", "a1q.stages", Stage),
    "schemes": Family("schemes", "a1q.quant.schemes", Scheme),
    "exporters": Family("exporters", "a1q.exporters", Exporter),
}


def schema_folder() -> Path:
    """The folder of the shipped JSON Schemas."""
    return ROOT / "schemas"


@dataclass
class Registry:
    """Names, schemas and classes of everything a recipe can mention."""

    plugins: dict[tuple[str, str], type] = field(default_factory=dict)
    digests: dict[tuple[str, str], str] = field(default_factory=dict)

    def names(self, family: str) -> list[str]:
        """All names of a family, sorted."""
        built_in = {path.stem for path in (schema_folder() / family).glob("*.json")}
        return sorted(built_in | {name for kind, name in self.plugins if kind == family})

    def schema(self, family: str, name: str) -> Mapping[str, Any]:
        """The JSON Schema of one plug-in.

        Raises:
            KeyError: if there is no such name; `nearest` suggests one.
        """
        plugin = self.plugins.get((family, name))
        if plugin is not None:
            return cast(Any, plugin).schema
        return _read_schema(family, name)

    def get(self, family: str, name: str) -> Any:
        """The class of one plug-in; imports its file.

        Raises:
            KeyError: if there is no such name.
        """
        plugin = self.plugins.get((family, name))
        if plugin is not None:
            return plugin
        _read_schema(family, name)
        kind = FAMILIES[family]
        module = importlib.import_module(f"{kind.module}.{name}")
        return _only_subclass(module, kind.base)

    def digest(self, family: str, name: str) -> str:
        """Digest of a plug-in's file, or an empty string for a built-in."""
        return self.digests.get((family, name), "")

    def nearest(self, family: str, name: str) -> str:
        """The known name most like `name`, or an empty string."""
        return next(iter(difflib.get_close_matches(name, self.names(family), 1)), "")

    def add(self, family: str, name: str, cls: type, digest: str) -> None:
        """Register a plug-in class that carries its schema.

        Raises:
            UsageError: if the name is taken, or the class is of another kind or carries no schema.
        """
        base = FAMILIES[family].base
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise UsageError(f"plug-in {name!r} in a1q.{family} is not a subclass of {base.__name__}")
        if not isinstance(getattr(cls, "schema", None), Mapping):
            raise UsageError(f"plug-in {name!r} in a1q.{family} carries no `schema` mapping")
        if name in self.names(family):
            raise UsageError(f"plug-in {name!r} in a1q.{family}: that name is already taken")
        if wrong := _schema_fault(family, cls):
            raise UsageError(f"plug-in {name!r} in a1q.{family}: {wrong}")
        self.plugins[family, name] = cls
        self.digests[family, name] = digest


@functools.cache
def _read_schema(family: str, name: str) -> Mapping[str, Any]:
    path = schema_folder() / family / f"{name}.json"
    if not path.is_file() or path.parent != schema_folder() / family:
        raise KeyError(name)
    return json.loads(path.read_text(encoding="utf-8"))


def _schema_fault(family: str, cls: Any) -> str:
    """What is wrong with the schema that a plug-in class carries, or an empty string."""
    import dataclasses

    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(cls.schema)
    except SchemaError as error:
        return f"its schema is no JSON Schema: {error.message} at {error.json_path}"
    if family == "stages" and not isinstance(cls.schema.get("x-a1q", {}).get("output"), str):
        return "its schema doesn't name the kind of artifact it makes: x-a1q.output"
    if family == "stages" and cls.make_config.__func__ is not cast(Any, Stage.make_config).__func__:
        return ""
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        return "it has no dataclass `Config`"
    odd = sorted({item.name for item in dataclasses.fields(config)} ^ set(cls.schema.get("properties", {})))
    return f"its Config and its schema disagree about {', '.join(odd)}" if odd else ""


def _only_subclass(module: Any, base: type) -> type:
    found = [
        item
        for name, item in vars(module).items()
        if inspect.isclass(item)
        and issubclass(item, base)
        and item.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one public {base.__name__}, not {len(found)}")
    return found[0]


_active: list[Registry] = []


def active_registry() -> Registry:
    """The registry of this process: what the command line loaded last, else the built-ins and entry points.

    Code that meets a name inside an artifact (a scheme in a checkpoint's header) looks it up here.
    """
    if not _active:
        load_registry()
    return _active[0]


def plugin_name(cls: type) -> str:
    """Name of a plug-in class loaded from a file: its `name`, else the class name in snake_case."""
    named = vars(cls).get("name")
    if isinstance(named, str):
        return named
    return "".join("_" + char.lower() if char.isupper() else char for char in cls.__name__).lstrip("_")


def load_registry(plugin_files: Sequence[Path] = ()) -> Registry:
    """The built-ins, the installed entry points, and the plug-ins of `--plugin FILE`; becomes the active registry.

    Raises:
        UsageError: if a plug-in can't be loaded; the message says which and why.
    """
    registry = Registry()
    for family in FAMILIES:
        for entry in entry_points(group=f"a1q.{family}"):
            try:
                cls = entry.load()
                digest = sha256_file(Path(inspect.getfile(cls)))
            except Exception as error:
                raise UsageError(f"plug-in {entry.name!r} ({entry.value}) failed to load: {error}") from error
            registry.add(family, entry.name, cls, digest)
    for path in plugin_files:
        _load_file(registry, Path(path))
    _active[:] = [registry]
    return registry


def _load_file(registry: Registry, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"--plugin {path}: no such file")
    digest = sha256_file(path)
    module_name = f"a1q_plugin_{path.stem}_{digest[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while the class is made
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results, JSON among them
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--plugin {path}: {type(error).__name__}: {error}") from error
    count = 0
    for kind in FAMILIES.values():
        for label, item in list(vars(module).items()):
            own = inspect.isclass(item) and issubclass(item, kind.base) and item.__module__ == module_name
            if own and not label.startswith("_"):
                registry.add(kind.name, plugin_name(item), item, digest)
                count += 1
    if not count:
        raise UsageError(f"--plugin {path}: defines no stage, scheme or exporter")
