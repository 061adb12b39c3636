"""Recipe -> Plan: walk the stages over predicted views of the model, and find what does not fit before a run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from a1q.engine.artifact import Artifact
from a1q.engine.matching import matching
from a1q.engine.plan import SOURCE, Plan, PlannedStage
from a1q.engine.registry import Registry
from a1q.engine.stage import DataEntry, Group, PlanContext
from a1q.errors import A1QError, MismatchError, Problem, RecipeError
from a1q.models.view import ModelView
from a1q.recipe.paths import Path, find, indexed
from a1q.recipe.recipe import Recipe, StageSpec
from a1q.recipe.runtime import amp_refusal, refusal, resolve_runtime

WRONG_RECIPE = 2
"""Exit code that tells a wrong recipe from one that does not fit."""


def make_plan(recipe: Recipe, registry: Registry, *, smoke: bool = False) -> Plan:
    """Resolve a recipe against its model and data, and let every stage check what it will meet.

    Nothing is downloaded but the model's files, where the source is a Hub id that is not in the local cache.

    Args:
        recipe: a checked recipe.
        registry: what it was checked against.
        smoke: make every stage tiny, as its schema's `smoke` says.

    Raises:
        RecipeError: if anything is wrong whatever the model; then also with everything that does not fit.
        MismatchError: if something does not fit this model, exporter or machine.
    """
    return _Planner(recipe, registry, smoke).plan()


class _Planner:
    def __init__(self, recipe: Recipe, registry: Registry, smoke: bool):
        self.recipe = recipe
        self.registry = registry
        self.smoke = smoke
        self.wrong: list[Problem] = []
        self.unfit: list[Problem] = []
        self.views: dict[str, Any] = {}
        """Predicted view by stage id; a stage with problems has none, and what takes its result is not planned."""
        self.kinds: dict[str, str | None] = {}
        """Format by data entry, as far as that is known."""
        self.read_model = functools.cache(self._read_model)

    def plan(self) -> Plan:
        recipe = self.recipe
        data = {name: self.data_entry(name, self.with_parts(config)) for name, config in recipe.data.items()}
        source = None
        if recipe.model is not None:
            found = self.model(recipe.model, ("model", "source"))
            if found:
                source, self.views[SOURCE] = found
        self.check_formats(source)
        if message := refusal(recipe.runtime["device"]):
            hint = "use `runtime: {device: auto}` or --set runtime.device=cpu"
            self.unfit.append(recipe.problem(("runtime", "device"), message, hint))
        runtime = resolve_runtime(recipe.runtime)
        if message := amp_refusal(runtime):
            self.unfit.append(recipe.problem(("runtime", "amp"), message, "use `amp: bf16` or `amp: no`"))
        planned = [item for spec in recipe.stages if (item := self.stage(spec, data)) is not None]
        if self.wrong:
            raise RecipeError(_ordered(self.wrong + self.unfit))
        if self.unfit:
            raise MismatchError(_ordered(self.unfit))
        return Plan(
            name=recipe.name,
            seed=recipe.seed,
            runtime=runtime,
            source=source,
            stages=tuple(planned),
            recipe_file=recipe.file,
            recipe_text=recipe.text,
            resolved=recipe.document,
            smoke=self.smoke,
        )

    def with_parts(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A data entry with those that it mixes: `parts`, in the order of the mix."""
        if config.get("mix") is None:
            return config
        parts = [
            {"name": name, "weight": float(weight), "entry": self.recipe.data[name]}
            for name, weight in config["mix"].items()
        ]
        return {**config, "parts": parts}

    def data_entry(self, name: str, config: Mapping[str, Any]) -> DataEntry:
        """The entry with its identity, as far as that is known without reading much; its first row is looked at."""
        from a1q.data import identify
        from a1q.data.records import look
        from a1q.data.tables import is_hub_id

        try:
            entry = DataEntry(name, config, identify(config))
            self.kinds[name] = look(config)
            if config["source"] is not None and not is_hub_id(config["source"]):
                for key in ("revision", "split"):
                    if config[key] is not None:
                        message = f"`{key}` is for data sets of the Hub, and {config['source']} is none"
                        self.wrong.append(self.recipe.problem(("data", name, key), message, f"leave `{key}` out"))
            return entry
        except A1QError as error:
            if config.get("mix") is None:  # else the part itself has said so
                self.refuse(("data", name, "source"), error)
            return DataEntry(name, config)

    def check_formats(self, model: Artifact | None) -> None:
        """Refuse conversations that the model's chat template can't write, and thinking of running text."""
        from a1q.data.templates import refusal, template_of

        for name, kind in self.kinds.items():
            thinking = self.recipe.data[name]["thinking"]
            if kind == "text" and thinking is not None:
                message = f"`thinking` is for conversations, and {self.recipe.data[name]['source']} is running text"
                hint = "name the format of its conversations, such as `format: alpaca`, or leave `thinking` out"
                self.unfit.append(self.recipe.problem(("data", name, "thinking"), message, hint))
            elif kind not in (None, "text") and model is not None:
                where = str(model.meta.get("source", model.path))
                problem = refusal(template_of(model.path), thinking in ("on", "both"), where)
                if problem is not None:
                    key = "thinking" if thinking else "source"
                    self.unfit.append(self.recipe.problem(("data", name, key), problem.message, problem.hint))

    def model(self, written: Mapping[str, Any], path: Path) -> tuple[Artifact, ModelView] | None:
        """A model source as an artifact and a view; None if it can't be had, which is then a problem at `path`."""
        try:
            return self.read_model(written["source"], written.get("revision"))
        except A1QError as error:
            self.refuse(path, error)
            return None

    def adapter(self, written: Mapping[str, Any], path: Path) -> tuple[Artifact, Any] | None:
        """An adapter's folder and what it holds; None if it can't be had, which is then a problem at `path`."""
        from a1q.models.adapter_source import read_adapter_view, resolve_adapter

        try:
            artifact = resolve_adapter(written["source"])
            return artifact, read_adapter_view(artifact.path)
        except A1QError as error:
            self.refuse(path, error)
            return None

    def _read_model(self, source: str, revision: str | None) -> tuple[Artifact, ModelView]:
        from a1q.models.source import resolve_source
        from a1q.models.view import read_view

        artifact = resolve_source(source, revision)
        return artifact, read_view(artifact.path)

    def refuse(self, path: Path, error: A1QError) -> None:
        """Record an error of another part at its place in the recipe."""
        problems = getattr(error, "problems", (Problem(str(error)),))
        into = self.wrong if error.exit_code == WRONG_RECIPE else self.unfit
        into += [self.recipe.problem(path, item.message, item.hint) for item in problems]

    def stage(self, spec: StageSpec, data: Mapping[str, DataEntry]) -> PlannedStage | None:
        """Plan one stage; None if it has problems or an input that had some."""
        inputs: dict[str, str | Artifact | None] = {}
        views: dict[str, Any] = {}
        declared = self.registry.schema("stages", spec.type)["x-a1q"].get("inputs", {})
        for name, reference in spec.inputs.items():
            if isinstance(reference, Mapping):
                find_it = self.adapter if declared[name]["kind"] == "adapter" else self.model
                found = find_it(reference, (*spec.path, *declared[name]["at"].split("."), "source"))
                if found is None:
                    return None
                inputs[name], views[name] = found
            else:
                if reference is not None and reference not in self.views:
                    return None
                inputs[name] = reference
                views[name] = None if reference is None else self.views[reference]
        before = len(self.wrong) + len(self.unfit)
        stage = self.registry.get("stages", spec.type)()
        options = self.tiny(spec) if self.smoke else spec.options
        context = PlanContext(
            id=spec.id,
            config=stage.make_config(options),
            views=views,
            groups=self.recipe.groups,
            data=data,
            report=functools.partial(self.report, spec),
        )
        try:
            outcome = stage.plan(context)
        except A1QError as error:
            self.refuse(spec.path, error)
        if len(self.wrong) + len(self.unfit) > before:
            return None
        self.views[spec.id] = outcome.view
        sources = [declared[name]["at"] for name, item in spec.inputs.items() if isinstance(item, Mapping)]
        groups = {name: self.recipe.groups[name] for name in sorted(context.used_groups)}
        uses = spec.uses | _schemes_in([*views.values(), outcome.view])
        plugins = {("stages", spec.type), *uses}
        return PlannedStage(
            id=spec.id,
            type=spec.type,
            stage=stage,
            config=context.config,
            options=_without(options, sources),
            inputs=inputs,
            output=spec.output,
            outcome=outcome,
            data={name: data[name] for name in spec.data},
            groups=groups,
            modules={name: _modules(group, views) for name, group in groups.items()},
            plugins={
                f"{family}/{name}": digest
                for family, name in sorted(plugins)
                if (digest := self.registry.digest(family, name))
            },
            parts={f"{family}/{name}": self.registry.get(family, name).version for family, name in sorted(uses)},
        )

    def report(self, spec: StageSpec, dotted: str, message: str, hint: str, mismatch: bool) -> None:
        """What `PlanContext` calls: record a problem at a dotted path inside a stage's options."""
        path: Path = spec.path
        if dotted:
            beside = dotted == "from" and "from" in find(self.recipe.root, spec.path[:2]).entries
            path = indexed(self.recipe.root, (*(spec.path[:2] if beside else spec.path), *dotted.split(".")))
        (self.unfit if mismatch else self.wrong).append(self.recipe.problem(path, message, hint))

    def tiny(self, spec: StageSpec) -> Mapping[str, Any]:
        """The stage's options with what its schema, and those of the plug-ins it uses, replace in a smoke run."""
        options = copy.deepcopy(dict(spec.options))
        for family, name in (("stages", spec.type), *(use for use in spec.uses if use[0] == "exporters")):
            for dotted, value in self.registry.schema(family, name).get("x-a1q", {}).get("smoke", {}).items():
                *above, last = dotted.split(".")
                place = functools.reduce(lambda node, part: node and node[part], above, options)
                if place is not None:  # a mapping that is null has nothing to make small
                    place[last] = copy.deepcopy(value)
        return options


def _without(options: Mapping[str, Any], paths: list[str]) -> Mapping[str, Any]:
    """The options without the sources of models at `paths`: those enter the cache key by content, as inputs."""
    kept = copy.deepcopy(dict(options))
    for dotted in paths:
        *above, last = dotted.split(".")
        functools.reduce(lambda node, part: node[part], above, kept)[last] = {}
    return kept


def _modules(group: Group, views: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules of the stage's model that a group matches."""
    model = next((view for view in views.values() if isinstance(view, ModelView)), None)
    return () if model is None else tuple(matching(group, model))


def _schemes_in(views: list[Any]) -> set[tuple[str, str]]:
    """The schemes that modules in these views have or may get."""
    modules = [item for view in views if isinstance(view, ModelView) for item in view.modules.values()]
    return {("schemes", spec["scheme"]) for item in modules for spec in (item.scheme, *item.alternatives) if spec}


def _ordered(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda item: (item.line, item.column))
