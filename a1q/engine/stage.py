"""What a stage is, and what it sees while planning and while running.

A stage is one code file `a1q/stages/NAME.py` holding one subclass of `Stage`, and one schema
`schemas/stages/NAME.json`. The schema is the only place where options, defaults, descriptions, inputs and
the output kind stand; the class holds the behaviour. Nothing in this file, and nothing at the top of a
stage's file, imports torch: `a1q plan` must stay light.

The schema's `x-a1q` block::

    "x-a1q": {
      "inputs": {"model":   {"kind": "model", "at": "from"},
                 "teacher": {"kind": "teacher", "at": "objective.kd"},
                 "statistics": {"kind": "statistics", "at": "statistics", "optional": true}},
      "output": "model",
      "data": ["data"],                 # dotted paths of options that name an entry of the recipe's `data:`
      "smoke": {"steps": 1}             # options that `a1q run --smoke` replaces
    }

`at: from` is the stage's own `from` (default: the nearest earlier artifact of that kind; for `model`, the
recipe's `model:` when there is none; with `"default": "source"` always the recipe's `model:`). Any other `at` is a
dotted path to an option that holds a stage id, or for a `model` or `adapter` a `{source: ...}` mapping, or null
where the input is optional (`"default": "nearest"` then takes the nearest earlier artifact of the kind if there is
one). A mapping where another kind is optional stands for itself: `quantize: {rules: {mlp: ...}}` takes no artifact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from a1q.engine.artifact import Artifact
from a1q.engine.config import build_config
from a1q.engine.world import ALONE, World


@dataclass(frozen=True)
class Runtime:
    """Where and how numbers are computed, resolved from the recipe's `runtime:` (no `auto` left)."""

    device: str = "cpu"
    """`cpu`, `cuda` or `mps`."""
    amp: str = "no"
    """Autocast type: `no`, `bf16` or `fp16`."""
    params: str = "fp32"
    threads: int = 1
    shard: bool = False
    """Whether several processes split latent weights and their moments among them."""


@dataclass(frozen=True)
class DataEntry:
    """One entry of the recipe's `data:`, with its identity. `a1q.data.token_sequences(entry.config, ...)` reads it."""

    name: str
    config: Mapping[str, Any]
    """The validated, default-filled mapping: `source`, `seq_len`, `holdout`, ..."""
    digest: str = ""
    """Content digest of the source; empty until it is known (before the text was extracted, say)."""


@dataclass(frozen=True)
class Group:
    """A named set of modules: `match` is a regex used with fullmatch on module names."""

    name: str
    match: str
    expect: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a stage predicts it will produce, before anything runs."""

    view: Any = None
    """For kind `model` an `a1q.models.view.ModelView`; for the other kinds a light mapping or None."""
    disk_bytes: int = 0
    memory_bytes: int = 0
    """Peak working memory expected, in bytes."""
    notes: tuple[str, ...] = ()
    """Lines that `a1q plan` prints below the stage (resolved modules, sizes)."""


@dataclass
class PlanContext:
    """What a stage sees while planning. It records problems instead of raising, so that all are shown at once."""

    id: str
    config: Any
    """The stage's frozen, typed config."""
    views: Mapping[str, Any]
    """The predicted view of every input, by input name; None for an absent optional one."""
    groups: Mapping[str, Group]
    data: Mapping[str, DataEntry]
    report: Callable[[str, str, str, bool], None]
    used_groups: set[str] = field(default_factory=set)

    def recipe_problem(self, path: str, message: str, hint: str = "") -> None:
        """Record that the recipe is wrong (exit 2) at dotted `path` inside this stage's options."""
        self.report(path, message, hint, False)

    def mismatch(self, path: str, message: str, hint: str = "") -> None:
        """Record that the recipe does not fit this model, exporter or machine (exit 3)."""
        self.report(path, message, hint, True)


@dataclass
class StageContext:
    """What a running stage sees. Everything it writes goes to `out`; the engine publishes that whole or not at all."""

    id: str
    config: Any
    seed: int
    """Derived from the run's seed and the stage's id."""
    inputs: Mapping[str, Artifact | None]
    """By input name; None for an absent optional one. Their files have been verified by digest."""
    out: Path
    """An empty temporary folder. Its files become the artifact."""
    scratch: Path
    """A folder that survives kill and is found again by the same command: checkpoints live here.
    Deleted when the stage has been published."""
    shared: Callable[[Mapping[str, Any]], Path] | None = None
    """JSON values -> a folder for what hangs on them alone: this stage finds it again with other options. Two runs may
    write there at a time, and it may be gone later. None: there is no such place."""
    runtime: Runtime = field(default_factory=Runtime)
    groups: Mapping[str, Group] = field(default_factory=dict)
    data: Mapping[str, DataEntry] = field(default_factory=dict)
    smoke: bool = False
    world: World = ALONE
    """The processes that run this stage together; one alone unless the stage is `parallel`."""
    emit: Callable[[str, Mapping[str, Any]], None] = lambda kind, values: None
    """Receives `("progress", {...})`, `("log", {...})`."""
    should_stop: Callable[[], int] = lambda: 0
    """The number of the signal that asked this run to stop, or 0."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What ends in `report.json` under this stage's `metrics`; JSON values only."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What travels inside the artifact's manifest (and so in its digest); JSON values only, no times."""

    def progress(self, step: int, total: int, **values: float) -> None:
        """Tell that `step` of `total` is done, with figures such as loss=, tokens=; then honour a request to stop.

        A stage that can checkpoint asks `should_stop()` itself first, saves, and then calls this.

        Raises:
            Interrupted: when SIGINT or SIGTERM has arrived.
        """
        from a1q.errors import Interrupted

        self.emit("progress", {"step": step, "total": total, **values})
        signal_number = self.should_stop()
        if signal_number:
            raise Interrupted(signal_number)

    def log(self, message: str) -> None:
        """Say one line to the user; it also goes to events.jsonl."""
        self.emit("log", {"message": message})


class Stage(ABC):
    """One kind of stage. Subclasses are found by file name; they hold no state between calls."""

    version: ClassVar[int] = 1
    """Part of the cache key: raise it whenever the same options give other numbers."""
    Config: ClassVar[type]
    """A frozen dataclass whose fields are the schema's properties (see `a1q.engine.config`)."""
    parallel: ClassVar[bool] = False
    """Whether all processes of a run call `run` at once, each with its place in `ctx.world`. All but the leading one
    write nothing but what they compute for others, into `ctx.scratch`."""
    schema: ClassVar[Mapping[str, Any] | None] = None
    """Inline schema, for plug-ins outside this package only."""

    @classmethod
    def make_config(cls, options: Mapping[str, Any]) -> Any:
        """The typed config for validated, default-filled options; `export` overrides it for its exporter's options."""
        return build_config(cls.Config, options)

    @abstractmethod
    def plan(self, ctx: PlanContext) -> Outcome:
        """Check the options against the inputs' views and predict the outcome. Never imports torch."""

    @abstractmethod
    def run(self, ctx: StageContext) -> None:
        """Do the work: read `ctx.inputs`, write files to `ctx.out`, fill `ctx.metrics` and `ctx.meta`."""
