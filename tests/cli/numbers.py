"""A plug-in of four stages that work on one number: what a third party could write, and what the tests run."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.errors import StageError


def _schema(properties: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "x-a1q": about}


_NUMBER = {"description": "A number.", "type": "integer", "default": 1}
_INPUT = {"inputs": {"model": {"kind": "number", "at": "from"}}}


class _NumberStage(Stage):
    def plan(self, ctx: PlanContext) -> Outcome:
        return Outcome()

    def run(self, ctx: StageContext) -> None:
        before = ctx.inputs.get("model")
        start = int((before.path / "number.txt").read_text()) if before else 0
        total = start + ctx.config.value
        steps = getattr(ctx.config, "steps", 1)
        for step in range(1, steps + 1):
            if step == getattr(ctx.config, "die_at", 0) and not (ctx.scratch / "died").exists():
                (ctx.scratch / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            ctx.progress(step, steps, loss=1.0 / step, tokens_per_second=1000.0)
        ctx.metrics.update(total=total, steps=steps)
        (ctx.out / "number.txt").write_text(str(total))


@dataclass(frozen=True)
class ValueConfig:
    value: int


@dataclass(frozen=True)
class AddConfig:
    value: int
    steps: int
    die_at: int


@dataclass(frozen=True)
class GateConfig:
    value: int
    most: int


class Begin(_NumberStage):
    name = "begin"
    Config = ValueConfig
    schema = _schema({"value": _NUMBER}, {"output": "number"})


class Add(_NumberStage):
    name = "add"
    Config = AddConfig
    schema = _schema(
        {"value": _NUMBER, "steps": {**_NUMBER, "default": 5}, "die_at": {**_NUMBER, "default": 0}},
        {**_INPUT, "output": "number", "smoke": {"steps": 1}},
    )


class Limit(_NumberStage):
    name = "limit"
    Config = GateConfig
    schema = _schema({"value": {**_NUMBER, "default": 0}, "most": _NUMBER}, {**_INPUT, "output": "report"})

    def run(self, ctx: StageContext) -> None:
        super().run(ctx)
        if ctx.metrics["total"] > ctx.config.most:
            ctx.meta["failed_gates"] = [f"total {ctx.metrics['total']} is more than {ctx.config.most}"]


class Ship(_NumberStage):
    name = "ship"
    Config = ValueConfig
    schema = _schema({"value": {**_NUMBER, "default": 0}}, {**_INPUT, "output": "package"})

    def run(self, ctx: StageContext) -> None:
        if ctx.config.value < 0:
            raise StageError("a package can't be negative")
        super().run(ctx)
