"""a1q's methods: calibrate, fit, train, snap, as `configurations.py` says."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.configurations import GRADIENTS, VERSION, Budget, Configuration
from benchmarks.quality.fits import keep_fit, kept_fit, place_of
from benchmarks.quality.job import Job, Outcome, peak_bytes
from benchmarks.quality.protocol import BATCH, CALIBRATION, versions
from benchmarks.quality.settings import Setting, bits_by_module
from benchmarks.quality.teachers import linears

if TYPE_CHECKING:
    from a1q.quant.statistics import Statistics
    from a1q.training.reconstruction import ReconstructConfig

EMBEDDING = "model.embed_tokens"


def run(job: Job, configuration: Configuration) -> Outcome:
    """Quantize every linear of the decoder layers, and the embedding where the setting says so."""
    import torch

    from a1q.models.checkpoint import load_model
    from a1q.quant.linear import quantized_modules
    from a1q.training.parameters import parameter_groups
    from benchmarks.quality.loop import distill

    teacher = load_model(job.teacher)
    student = copy.deepcopy(teacher)
    specs = specs_of(configuration, job.setting, [name for name, _ in linears(student)])
    record = fitted(student, specs, job, configuration)
    seconds = {"fit": record["seconds"]}
    facts: dict[str, Any] = {"module_bits": {name: spec["bits"] for name, spec in record["specs"].items()}}
    if job.setting.steps:
        assert job.lr is not None
        modules = [module for _, module in quantized_modules(student)]
        for module in modules:
            module.straight_through_fp16 = True
            if "weights" in configuration.train:
                module.start_latent()
        rates = {name: factor * job.lr for name, factor in configuration.train.items()}
        groups, _ = parameter_groups(student, modules, configuration.train, rates)
        tokens = torch.from_numpy(job.tokens.training)
        found = distill(student, teacher, tokens, groups, job.setting.steps, BATCH, seed=job.seed)
        seconds["train"] = found["seconds"]
        facts["losses"] = found["losses"]
    weights, bits = {}, 0
    for name, module in quantized_modules(student):
        module.snap()
        weights[f"{name}.weight"] = module.dequantize()
        bits += module.scheme.bits(module.shape)
    return Outcome(weights, bits, seconds, facts, max(peak_bytes(), record["peak_bytes"]))


def fitted(
    student: Any, specs: Mapping[str, Mapping[str, Any]], job: Job, configuration: Configuration
) -> dict[str, Any]:
    """Calibrate and fit, or take the same fit from a cell before; its `seconds`, `peak_bytes` and `specs`."""
    from a1q.models.source import resolve_source
    from a1q.quant.build import complete, make_scheme
    from a1q.quant.fitter import DenseFitter
    from a1q.quant.linear import quantized_modules

    complete_specs = {name: complete(spec) for name, spec in specs.items()}
    budget = configuration.budget.get(job.setting.bits) if isinstance(job.setting.bits, int) else None
    parts = {
        "version": VERSION,
        "gradients": GRADIENTS,
        "specs": complete_specs,
        "schemes": {spec["scheme"]: make_scheme(spec).version for spec in complete_specs.values()},
        "reconstruct": asdict(configuration.reconstruct) if configuration.reconstruct else None,
        "calibrate": configuration.calibrate,
        **({"budget": asdict(budget)} if budget else {}),
        "teacher": resolve_source(str(job.teacher)).digest,
        "tokens": job.tokens.digest,
        "seed": job.seed,
        "packages": versions(),
    }
    place = place_of(json.loads(json.dumps(parts)))
    kept = kept_fit(place)
    if kept is not None:
        fitter = DenseFitter(student, kept[1]["specs"], set(), job.seed)
        for name in kept[1]["specs"]:
            fitter.restore(name, kept[0][name], None)
        return kept[1]
    began = time.perf_counter()
    statistics = measured(student, job, configuration) if configuration.calibrate else None
    if budget is not None:
        assert statistics is not None
        specs = within_budget(student, specs, statistics, job, budget)
    fit(student, specs, statistics, job, configuration.reconstruct)
    seconds = time.perf_counter() - began
    record = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "specs": {name: dict(spec) for name, spec in specs.items()},
    }
    keep_fit(place, dict(quantized_modules(student)), record)
    return record


def specs_of(configuration: Configuration, setting: Setting, names: list[str]) -> dict[str, Mapping[str, Any]]:
    """The complete scheme mapping of every module that is quantized, the embedding first.

    Raises:
        KeyError: if no pattern of the configuration matches a module.
    """
    found: dict[str, Mapping[str, Any]] = {}
    if setting.whole:
        found[EMBEDDING] = configuration.embedding
    for name, bits in bits_by_module(setting, names).items():
        matching = [spec for pattern, spec in configuration.specs[bits].items() if fnmatchcase(name, pattern)]
        if not matching:
            raise KeyError(f"no pattern for {name} at {bits} bits")
        found[name] = {"bits": bits, **matching[0]}
    return found


def within_budget(
    model: Any, specs: Mapping[str, Mapping[str, Any]], statistics: Statistics, job: Job, budget: Budget
) -> dict[str, Mapping[str, Any]]:
    """`specs` with the bits of every linear that `allocate` would choose."""
    from a1q.distill.sensitivity import Divergences, quantized_weight
    from a1q.quant.allocation import Choice, allocate
    from a1q.quant.build import make_scheme

    meter = Divergences(model, job.tokens.calibration[: budget.sequences], BATCH)
    choices: dict[str, list[Choice]] = {}
    weights = 0
    for name in meter.ordered(specs):
        dense, inputs = model.get_submodule(name), statistics.inputs(name, gram=False)
        options = [{**specs[name], "bits": bits} for bits in budget.bits]
        tried = [quantized_weight(name, dense, option, inputs, job.seed) for option in options]
        prices = [make_scheme(option).bits(tuple(dense.weight.shape)) for option in options]
        losses = meter.of(name, tried, lambda: None)
        choices[name] = [Choice(bits, loss) for bits, loss in zip(prices, losses, strict=True)]
        weights += dense.weight.numel()
    found = allocate(list(choices.values()), int(budget.bpw * weights))
    chosen = {name: budget.bits[place] for name, place in zip(choices, found.chosen, strict=True)}
    return {name: {**spec, "bits": chosen[name]} for name, spec in specs.items()}


def measured(model: Any, job: Job, configuration: Configuration) -> Statistics:
    """What every weight is multiplied with on the calibration tokens."""
    from a1q.quant.calibration import measure_statistics
    from a1q.quant.statistics import Statistics

    folder = job.scratch / "statistics"
    folder.mkdir()
    tokens = job.tokens.calibration[:CALIBRATION]
    # the layers' matrices are measured again, in order; the embedding's, the tied head's, are not
    measure_statistics(
        model,
        tokens,
        Path(folder),
        batch_size=8,
        gram=job.setting.whole,
        gradient_sequences=GRADIENTS if configuration.reconstruct else 0,
        seed=job.seed,
    )
    return Statistics(folder)


@dataclass(frozen=True)
class _Options:
    """What of `quantize`'s options decides how modules are fitted in order."""

    reconstruct: ReconstructConfig | None
    sequential: bool = True


def fit(
    student: Any,
    specs: Mapping[str, Mapping[str, Any]],
    statistics: Statistics | None,
    job: Job,
    reconstruct: ReconstructConfig | None,
) -> None:
    """Put quantized modules in the place of dense ones, as `quantize` does."""
    from a1q.engine.stage import StageContext
    from a1q.quant.fitter import DenseFitter
    from a1q.training.blockwise import fit_in_order

    ctx = StageContext("fit", None, job.seed, {}, out=job.scratch / "out", scratch=job.scratch / "fit")
    fitter = DenseFitter(student, specs, set(), job.seed)
    fit_in_order(ctx, student, list(specs), fitter, statistics, _Options(reconstruct), {})
