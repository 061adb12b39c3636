"""Check a composed recipe against its schemas and link its stages: everything that needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a1q.data.formats import FORMATS
from a1q.engine.pattern import compile_pattern
from a1q.engine.plan import SOURCE
from a1q.engine.registry import Registry, schema_folder
from a1q.engine.stage import Group
from a1q.errors import Problem, RecipeError
from a1q.recipe import paths
from a1q.recipe.links import NO_MODEL, Producer, Surroundings, link_data, link_inputs
from a1q.recipe.recipe import Recipe, StageSpec, problem_at
from a1q.recipe.schema import Checker, Finding
from a1q.recipe.text import Node, kind_of, shortened

OF_A_SOURCE = ("revision", "split", "column", "format", "thinking", "holdout")
"""Options of a data entry that say how a source is read."""


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe's root, `schemas/recipe.schema.json`."""
    import json

    return json.loads((schema_folder() / "recipe.schema.json").read_text(encoding="utf-8"))


def validate(file: str, text: str, root: Node, registry: Registry) -> Recipe:
    """Check a composed recipe and return it typed, default-filled and linked.

    Raises:
        RecipeError: with all root problems, in the order of the text.
    """
    return _Validation(file, text, root, registry).recipe()


class _Validation:
    def __init__(self, file: str, text: str, root: Node, registry: Registry):
        self.file, self.text, self.root = file, text, root
        self.registry = registry
        self.checker = Checker(registry)
        self.document: dict[str, Any] = root.plain()
        self.ids = paths.stage_ids(root)
        self.problems: list[Problem] = []

    def report(self, path: paths.Path, message: str, hint: str = "", at_key: bool = False) -> None:
        self.problems.append(problem_at(self.root, path, message, hint, at_key))

    def report_all(self, base: paths.Path, findings: list[Finding]) -> None:
        for item in findings:
            self.report((*base, *item.path), item.message, item.hint, item.at_key)

    def recipe(self) -> Recipe:
        schema = recipe_schema()
        schema["required"] = [*schema["required"], "stages"]  # a composed recipe has stages, wherever they come from
        del schema["anyOf"]
        findings = self.checker.check(schema, self.document)
        self.report_all((), findings)
        self.check_patterns()
        self.check_data()
        specs = self.stages({item.path[0] for item in findings if item.path})
        if self.problems:
            raise RecipeError(shortened(sorted(self.problems, key=lambda item: (item.line, item.column))))
        filled = self.checker.fill(schema, self.document, set())
        for spec in specs:
            filled["stages"][spec.index] = {"id": spec.id, **_from(spec), spec.type: dict(spec.options)}
        groups = {name: Group(name, item["match"], item["expect"]) for name, item in filled["groups"].items()}
        return Recipe(
            file=self.file,
            text=self.text,
            root=self.root,
            document=filled,
            name=filled["name"],
            seed=filled["seed"],
            runtime=filled["runtime"],
            model=filled["model"],
            data=filled["data"],
            groups=groups,
            stages=tuple(specs),
        )

    def check_patterns(self) -> None:
        """Refuse a `match` that is no regex or can't be matched in bounded time."""
        groups = self.document.get("groups")
        for name, group in groups.items() if isinstance(groups, dict) else ():
            match = group.get("match") if isinstance(group, dict) else None
            if isinstance(match, str):
                try:
                    compile_pattern(match)
                except ValueError as error:
                    self.report(("groups", name, "match"), str(error))

    def check_data(self) -> None:
        """Refuse an entry with neither or both of `source` and `mix`, and a mix of what can't be mixed."""
        entries = self.document.get("data")
        entries = entries if isinstance(entries, dict) else {}
        for name, entry in entries.items():
            if not isinstance(entry, dict):
                continue
            mix = entry.get("mix")
            if (entry.get("source") is None) == (mix is None):
                found = "neither" if mix is None else "both"
                self.report(
                    ("data", name), f"an entry has a `source` or a `mix`, and this one has {found}", at_key=True
                )
            if entry.get("column") is not None and entry.get("format") in FORMATS:
                hint = "leave it out, or write `format: text`"
                self.report(("data", name, "column"), "`column` names the one that running text stands in", hint)
            if not isinstance(mix, dict):
                continue
            for key in OF_A_SOURCE:
                if entry.get(key) is not None:
                    hint = "write it in the entries that are mixed"
                    self.report(("data", name, key), f"`{key}` belongs to a source, and this entry is a mix", hint)
            for part in mix:
                path = ("data", name, "mix", part)
                if part not in entries:
                    hint = paths.suggest(str(part), [item for item in entries if item != name], "entries")
                    self.report(path, f"there is no entry {part!r} under `data:`", hint, at_key=True)
                elif isinstance(entries[part], dict) and entries[part].get("mix") is not None:
                    self.report(path, f"{part!r} is a mix itself", "mix sources", at_key=True)

    def stages(self, broken: set[Any]) -> list[StageSpec]:
        """Check and link every stage; `broken` are root keys with problems, of which references say nothing more."""
        stages = self.document.get("stages")
        if not isinstance(stages, list) or len(stages) > 200:
            return []
        self.check_ids()
        producers = []
        for index, stage in enumerate(stages):
            kind = self.kind(stage)
            named = bool(kind) or (isinstance(stage, dict) and "id" in stage)
            producers.append(Producer(self.ids[index] if named else "", kind))
        specs = []
        data = self.document.get("data")
        for index, stage in enumerate(stages):
            around = Surroundings(
                producers=producers,
                index=index,
                has_model=self.document.get("model") is not None,
                data=list(data) if isinstance(data, dict) else [],
            )
            spec = self.stage(index, stage, around, broken)
            if spec is not None:
                specs.append(spec)
        return specs

    def check_ids(self) -> None:
        first: dict[str, int] = {}
        for index, name in enumerate(self.ids):
            path = ("stages", index, "id")
            if name == SOURCE:
                self.report(path, f"{SOURCE!r} means the recipe's own model; a stage can't be called so")
            elif name in first:
                place = paths.find(self.root, ("stages", first[name])).place
                self.report(path, f"there are two stages {name!r}", f"the first is at line {place.line}")
            first.setdefault(name, index)

    def kind(self, stage: Any) -> str:
        """The artifact kind a stage makes; empty where its stage key can't be read."""
        keys = [key for key in stage if key not in paths.BESIDE] if isinstance(stage, dict) else []
        if len(keys) != 1 or keys[0] not in self.registry.names("stages"):
            return ""
        return str(self.about(keys[0]).get("output", ""))

    def about(self, key: str) -> Mapping[str, Any]:
        """A stage's `x-a1q` block."""
        return self.registry.schema("stages", key).get("x-a1q", {})

    def stage(self, index: int, stage: Any, around: Surroundings, broken: set[Any]) -> StageSpec | None:
        """Check one stage; None if it has problems."""
        base: paths.Path = ("stages", index)
        if not isinstance(stage, dict):
            return None  # the root schema has said so
        key = self.stage_key(base, stage)
        if key is None:
            return None
        before = len(self.problems)
        options = stage[key] if stage[key] is not None else {}
        if not isinstance(options, dict):
            self.report((*base, key), f"expected a mapping of options, found {kind_of(options)}")
            return None
        options = dict(options)
        written_from = self.take_from(base, key, stage, options)
        schema = self.registry.schema("stages", key)
        self.report_all((*base, key), self.checker.check(schema, options))
        if len(self.problems) > before:
            return None
        uses: set[tuple[str, str]] = set()
        options = self.checker.fill(schema, options, uses)
        inputs, findings = link_inputs(self.about(key), options, written_from, around)
        data, data_findings = link_data(self.about(key), options, around)
        if "data" not in broken:
            findings += data_findings
        if "model" in broken:
            findings = [item for item in findings if NO_MODEL not in item.message]
        elif any(NO_MODEL in item.message for item in findings):
            broken.add("model")  # said once
        from_path = base if "from" in stage else (*base, key)
        for item in findings:
            path = (*(from_path if item.path == ("from",) else (*base, key)), *item.path)
            self.report(path, item.message, item.hint, at_key=not item.path)
        return StageSpec(
            index=index,
            id=self.ids[index],
            type=key,
            options=options,
            from_=written_from,
            inputs=inputs,
            output=str(self.about(key)["output"]),
            data=tuple(dict.fromkeys(data)),
            uses=frozenset(uses),
        )

    def stage_key(self, base: paths.Path, stage: dict[str, Any]) -> str | None:
        keys = [key for key in stage if key not in paths.BESIDE]
        names = self.registry.names("stages")
        if not keys:
            self.report(base, "this stage has no stage key: it needs exactly one", f"stages: {', '.join(names)}")
            return None
        if len(keys) > 1:
            stray = next((key for key in keys if key not in names), keys[1])
            message = f"a stage has exactly one stage key, and this one has {', '.join(keys)}"
            kept = next((key for key in keys if key in names and key != stray), None)
            hint = f"an option of {kept} stands inside it" if kept else f"stages: {', '.join(names)}"
            self.report(
                (*base, stray), message, hint if stray not in names else "make it a stage of its own", at_key=True
            )
            return None
        if keys[0] not in names:
            hint = paths.suggest(keys[0], names, "stages")
            self.report((*base, keys[0]), f"there is no stage {keys[0]!r}", hint, at_key=True)
            return None
        return keys[0]

    def take_from(self, base: paths.Path, key: str, stage: dict[str, Any], options: dict[str, Any]) -> str | None:
        """The stage's `from`, which may stand beside its id or inside its options; removed from the options."""
        beside = stage.get("from")
        if "from" not in options or "from" in self.registry.schema("stages", key).get("properties", {}):
            return beside if isinstance(beside, str) else None
        inside = options.pop("from")
        if "from" in stage:
            self.report((*base, key, "from"), "`from` stands twice: beside `id` and here", at_key=True)
        elif not isinstance(inside, str):
            self.report((*base, key, "from"), f"expected the id of an earlier stage, found {kind_of(inside)}")
        else:
            return inside
        return None


def _from(spec: StageSpec) -> dict[str, str]:
    return {} if spec.from_ is None else {"from": spec.from_}
