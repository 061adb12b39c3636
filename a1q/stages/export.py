"""`export`: hand a model to the exporter named by `format`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1q.engine.config import build_config
from a1q.engine.registry import active_registry
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext


@dataclass(frozen=True)
class ExportConfig:
    """The format, and the exporter's own typed options."""

    format: str
    options: Any


class ExportStage(Stage):
    """Plan and run one exporter; which ones exist only the registry knows."""

    Config = ExportConfig

    @classmethod
    def make_config(cls, options: Mapping[str, Any]) -> ExportConfig:
        """Split the flat mapping: `format` is the stage's, everything else the exporter's."""
        rest = {name: value for name, value in options.items() if name != "format"}
        exporter = active_registry().get("exporters", options["format"])
        return ExportConfig(options["format"], build_config(exporter.Config, rest))

    def plan(self, ctx: PlanContext) -> Outcome:
        """Refuse what the exporter can't take, before hours of training."""
        exporter = active_registry().get("exporters", ctx.config.format)()
        view = ctx.views["model"]
        found = [text for variant in view.variants() for text in exporter.refusals(variant, ctx.config.options)]
        refusals = list(dict.fromkeys(found))
        for refusal in refusals:
            ctx.mismatch("format", refusal)
        if refusals:
            return Outcome()
        return Outcome(
            view={"format": ctx.config.format},
            disk_bytes=exporter.estimate(view, ctx.config.options),
            memory_bytes=2 * 4 * view.parameters,
        )

    def run(self, ctx: StageContext) -> None:
        """Let the exporter write its files."""
        model = ctx.inputs["model"]
        assert model is not None
        ctx.meta["format"] = ctx.config.format
        active_registry().get("exporters", ctx.config.format)().export(model, ctx.config.options, ctx)
