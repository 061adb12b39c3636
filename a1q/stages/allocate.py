"""`allocate`: a scheme for every module, chosen by measured damage under a budget for the whole model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a1q.engine.matching import resolve_rules, summarize
from a1q.engine.registry import active_registry
from a1q.engine.stage import Outcome, PlanContext, Stage, StageContext
from a1q.errors import StageError
from a1q.models.view import DENSE, ModelView
from a1q.quant.bits import FLOAT_BITS, model_bits
from a1q.quant.build import make_scheme
from a1q.quant.planning import WORKING_COPIES, check_statistics, describe, planned_modules
from a1q.quant.rules import FILE, Rule

if TYPE_CHECKING:
    from a1q.quant.allocation import Allocation

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
PINNED = "rules.yaml"
MEASURED = "sensitivity.json"
"""What is measured already: a stage that was killed goes on, and another budget finds it too."""


@dataclass(frozen=True)
class Budget:
    """One of the two is given."""

    bits_per_param: float | None
    bytes: str | int | None

    def bits(self, parameters: int) -> int:
        """Bits that a model of so many parameters may take; 0 where neither is given."""
        if self.bits_per_param is not None:
            return int(self.bits_per_param * parameters)
        parts = re.fullmatch(r"([0-9.]+) ?(.*?)b?", str(self.bytes or 0).lower())
        assert parts is not None  # the schema has seen to it
        return int(8 * float(parts[1]) * UNITS[parts[2]])

    def say(self, bits: int, parameters: int) -> str:
        """Bits in the words of the budget."""
        if self.bits_per_param is not None:
            return f"{bits / parameters:.4g} bits per parameter"
        return f"{bits / 8e6:.4g} MB"


@dataclass(frozen=True)
class AllocateConfig:
    """Options of `allocate`."""

    budget: Budget
    candidates: Mapping[str, tuple[Mapping[str, Any], ...]]
    statistics: str | None
    sequences: int
    exact: bool
    batch: int


@dataclass(frozen=True)
class Candidate:
    """One way to quantize one module."""

    scheme: Mapping[str, Any]
    """The complete mapping."""
    bits: int


@dataclass(frozen=True)
class Options:
    """All that may be chosen, and what is spent already."""

    groups: Mapping[str, str]
    """Module -> group, in model order."""
    candidates: Mapping[str, tuple[Candidate, ...]]
    """By module, in the order of the recipe."""
    rest: int
    """Bits of every other parameter."""
    budget: int
    """Bits for everything."""

    def extreme(self, best: Any) -> int:
        """Bits of the whole model where every module takes its smallest (`min`) or its largest (`max`) candidate."""
        return self.rest + sum(best(item.bits for item in items) for items in self.candidates.values())


class AllocateStage(Stage):
    """Measure every candidate of every module, then solve a knapsack problem."""

    version = 2
    Config = AllocateConfig

    def plan(self, ctx: PlanContext) -> Outcome:
        """Resolve the groups, try every candidate's shape, and see that the budget can be met."""
        view: ModelView = ctx.views["model"]
        options = _options(ctx, view)
        check_statistics(ctx)
        if options is None:
            return Outcome()
        rules = {
            name: Rule(options.groups[name], tuple(item.scheme for item in sorted(items, key=lambda item: -item.bits)))
            for name, items in options.candidates.items()
        }
        largest = max(view.modules[name].shape[0] * view.modules[name].shape[1] for name in rules)
        weights = sum(view.modules[name].shape[0] * view.modules[name].shape[1] for name in rules)
        most = max(map(len, options.candidates.values()))
        length, config = ctx.views["statistics"].get("length", 0), view.config
        states = 2 * ctx.config.sequences * length * config.get("hidden_size", 0)
        logits = 5 * ctx.config.batch * length * config.get("vocab_size", 0)
        return Outcome(
            view=rules,
            disk_bytes=1000 * sum(map(len, options.candidates.values())),
            memory_bytes=4 * (view.parameters + max(weights, (most + WORKING_COPIES) * largest) + states + logits),
            notes=tuple(_notes(ctx.config, view, options)),
        )

    def run(self, ctx: StageContext) -> None:
        """Measure, choose, measure the choice, and write the rules."""
        from a1q.models.view import read_view
        from a1q.quant.allocation import Choice, allocate

        source = ctx.inputs["model"]
        assert source is not None
        view = read_view(source.path)
        plan = PlanContext(ctx.id, ctx.config, {"model": view}, ctx.groups, ctx.data, _refuse)
        options = _options(plan, view)
        assert options is not None
        measured = _Measuring(ctx, view, options)
        kl = measured.each()
        choices = [
            [Choice(item.bits, loss) for item, loss in zip(items, kl[name], strict=True)]
            for name, items in options.candidates.items()
        ]
        found = allocate(choices, options.budget - options.rest)
        chosen = dict(zip(options.candidates, found.chosen, strict=True))
        _write(ctx, view, options, kl, chosen, found, measured.together(chosen))


def _options(ctx: PlanContext, view: ModelView) -> Options | None:
    """What may be chosen; None where there are problems, which go to `ctx`."""
    config: AllocateConfig = ctx.config
    problems: list[tuple[str, str, str, bool]] = []
    report = ctx.report

    def count(*problem: Any) -> None:
        problems.append(problem)
        report(*problem)

    ctx = dataclasses.replace(ctx, report=count)
    owners = resolve_rules(ctx, config.candidates, "candidates", view)
    candidates: dict[str, list[Candidate]] = {name: [] for name in owners}
    for group, specs in config.candidates.items():
        modules = [view.modules[name] for name, owner in owners.items() if owner == group]
        if taken := [module.name for module in modules if module.state != DENSE]:
            state, named = view.modules[taken[0]].state, ", ".join(summarize(taken))
            ctx.recipe_problem(
                f"candidates.{group}",
                f"{len(taken)} modules are already {state}: {named}",
                "`allocate` chooses for dense modules; quantized ones count with the bits they have",
            )
            continue
        for index, spec in enumerate(specs):
            wanted = [(module, spec, False) for module in modules]
            for name, planned in planned_modules(ctx, f"candidates.{group}.{index}", wanted).items():
                assert planned.scheme is not None
                bits = make_scheme(planned.scheme).bits(planned.shape)
                candidates[name].append(Candidate(planned.scheme, bits))
    if problems:
        return None
    own = sum(view.modules[name].shape[0] * view.modules[name].shape[1] for name in owners)
    budget, rest = config.budget.bits(view.parameters), model_bits(view) - FLOAT_BITS * own
    options = Options(owners, {name: tuple(items) for name, items in candidates.items()}, rest, budget)
    if not budget:
        ctx.recipe_problem("budget", "this budget says nothing", "write `bits_per_param: 2.5` or `bytes: 200MB`")
    elif options.extreme(min) > budget:
        say = config.budget.say
        key = "bits_per_param" if config.budget.bits_per_param is not None else "bytes"
        dense = [name for name, module in view.modules.items() if module.state == DENSE and name not in owners]
        stay = f": {', '.join(summarize(dense, 4))}" if dense else ""
        ctx.mismatch(
            f"budget.{key}",
            f"a budget of {say(budget, view.parameters)} can't be met: the smallest candidates of all modules come to "
            f"{say(options.extreme(min), view.parameters)}",
            f"what is in no group takes {say(rest, view.parameters)}{stay}",
        )
    return None if problems else options


def _refuse(path: str, message: str, hint: str, mismatch: bool) -> None:
    raise StageError(f"{path}: {message}")


def _notes(config: AllocateConfig, view: ModelView, options: Options) -> Iterator[str]:
    for group in config.candidates:
        names = [name for name, owner in options.groups.items() if owner == group]
        weights = sum(view.modules[name].shape[0] * view.modules[name].shape[1] for name in names)
        low, high = (
            sum(best(item.bits for item in options.candidates[name]) for name in names) / weights for best in (min, max)
        )
        yield f"{group}: {len(names)} modules, {low:.2f} to {high:.2f} bits per weight"
        yield from (f"  {describe(spec)}" for spec in config.candidates[group])
    least, most = options.extreme(min), options.extreme(max)
    say = config.budget.say
    yield (
        f"budget {say(options.budget, view.parameters)}; the candidates reach from "
        f"{say(least, view.parameters)} to {say(most, view.parameters)}"
    )
    if most <= options.budget:
        yield "the budget holds the largest candidate of every module: there is nothing to trade"
    yield f"{sum(map(len, options.candidates.values()))} candidates are measured on {config.sequences} sequences"


class _Measuring:
    """The model in memory, and every candidate tried in it."""

    def __init__(self, ctx: StageContext, view: ModelView, options: Options):
        from a1q.distill.sensitivity import Divergences
        from a1q.models.checkpoint import load_model
        from a1q.quant.statistics import measured_modules, read_statistics
        from a1q.training.device import prepare_torch

        source = ctx.inputs["model"]
        assert source is not None
        device = prepare_torch(ctx.runtime, ctx.seed)
        statistics = read_statistics(ctx.inputs["statistics"], measured_modules(view, options.groups))
        assert statistics is not None
        self._ctx, self._options, self._statistics = ctx, options, statistics
        self.tokens = statistics.tokens[: ctx.config.sequences]
        self._model = load_model(source.path, device=device).eval()
        borders = None if statistics.borders is None else statistics.borders[: ctx.config.sequences]
        self._meter = Divergences(self._model, self.tokens, ctx.config.batch, borders)
        self._step = 0
        self._steps = (sum(map(len, options.candidates.values())) + 1) * self._meter.batches

    def each(self) -> dict[str, list[float]]:
        """KL of every candidate alone, by module; kept module by module."""
        from a1q.engine.files import write_atomic
        from a1q.engine.rundir import read_json

        shared = self._ctx.shared
        kept = (shared(self._identity()) if shared else self._ctx.scratch) / MEASURED
        found: dict[str, list[float]] = read_json(kept)
        self._step = self._meter.batches * sum(map(len, found.values()))
        for name in self._meter.ordered(self._options.candidates):
            if name not in found:
                weights = [self._weight(name, item) for item in self._options.candidates[name]]
                found[name] = self._meter.of(name, weights, self._tick)
                write_atomic(kept, json.dumps(found))
        return found

    def _identity(self) -> dict[str, Any]:
        """All that the KL of a single candidate hangs on; the budget is not in it."""
        from a1q.training.device import machine_identity

        ctx = self._ctx
        model, statistics = ctx.inputs["model"], ctx.inputs["statistics"]
        assert model is not None and statistics is not None
        candidates = {name: [item.scheme for item in items] for name, items in sorted(self._options.candidates.items())}
        return {
            "version": AllocateStage.version,
            "model": model.digest,
            "statistics": statistics.digest,
            "seed": ctx.seed,
            "sequences": ctx.config.sequences,
            "batch": ctx.config.batch,
            "exact": ctx.config.exact,
            "candidates": json.loads(json.dumps(candidates, default=dict)),
            "schemes": _scheme_versions(self._options),
            **machine_identity(ctx.runtime),
        }

    def together(self, chosen: Mapping[str, int]) -> float:
        """KL with every module quantized as chosen."""
        candidates = self._options.candidates
        weights = {name: self._weight(name, candidates[name][index]) for name, index in chosen.items()}
        return self._meter.together(weights, self._tick)

    def _weight(self, name: str, candidate: Candidate) -> Any:
        from a1q.distill.sensitivity import quantized_weight

        dense = self._model.get_submodule(name)
        inputs = self._statistics.inputs(name, gram=self._ctx.config.exact)
        return quantized_weight(name, dense, candidate.scheme, inputs, self._ctx.seed)

    def _tick(self) -> None:
        self._step += 1
        self._ctx.progress(self._step, self._steps)


def _scheme_versions(options: Options) -> dict[str, list[Any]]:
    """Scheme -> its version and the digest of its code, of every scheme among the candidates."""
    registry = active_registry()
    names = sorted({item.scheme["scheme"] for items in options.candidates.values() for item in items})
    return {name: [registry.get("schemes", name).version, registry.digest("schemes", name)] for name in names}


def _write(
    ctx: StageContext,
    view: ModelView,
    options: Options,
    kl: Mapping[str, list[float]],
    chosen: Mapping[str, int],
    found: Allocation,
    measured: float,
) -> None:
    """rules.json with everything measured, rules.yaml to paste, and the metrics."""
    from a1q.quant.pinning import pinned, pinned_text

    taken = {name: options.candidates[name][index] for name, index in chosen.items()}
    bits = options.rest + found.bits
    document = {
        "budget": {"bits_per_param": options.budget / view.parameters, "bytes": options.budget // 8},
        "reached": {"bits_per_param": bits / view.parameters, "bytes": -(-bits // 8)},
        "kl": {"predicted": found.loss, "bound": found.bound, "measured": measured},
        # Whoever takes these rules runs again when the code of a scheme has changed, whatever was chosen.
        "schemes": _scheme_versions(options),
        "modules": {
            name: {
                "group": options.groups[name],
                "shape": view.modules[name].shape,
                "scheme": item.scheme,
                "text": describe(item.scheme),
                "bits": item.bits,
                "kl": kl[name][chosen[name]],
                "candidates": [
                    {"scheme": other.scheme, "text": describe(other.scheme), "bits": other.bits, "kl": loss}
                    for other, loss in zip(options.candidates[name], kl[name], strict=True)
                ],
            }
            for name, item in taken.items()
        },
    }
    (ctx.out / FILE).write_text(json.dumps(document, indent=1, default=dict) + "\n", encoding="utf-8")
    rules = {name: Rule(options.groups[name], (item.scheme,)) for name, item in taken.items()}
    text = pinned_text(pinned(rules, list(view.modules), ctx.groups), ctx.id)
    (ctx.out / PINNED).write_text(text, encoding="utf-8")
    ctx.metrics.update(
        kl_predicted=found.loss,
        kl_measured=measured,
        bpw_model=bits / view.parameters,
        bytes=-(-bits // 8),
        kl_bound=found.bound,
        modules=len(taken),
    )
