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

from benchmarks.quality.configurations import GRADIENTS, VERSION, Configuration
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
    facts: dict[str, Any] = {}
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
    """Calibrate and fit, or take the same fit from a cell before; its `seconds` and `peak_bytes`."""
    from a1q.models.source import resolve_source
    from a1q.quant.build import complete, make_scheme
    from a1q.quant.fitter import DenseFitter
    from a1q.quant.linear import quantized_modules

    complete_specs = {name: complete(spec) for name, spec in specs.items()}
    parts = {
        "version": VERSION,
        "gradients": GRADIENTS,
        "specs": complete_specs,
        "schemes": {spec["scheme"]: make_scheme(spec).version for spec in complete_specs.values()},
        "reconstruct": asdict(configuration.reconstruct) if configuration.reconstruct else None,
        "calibrate": configuration.calibrate,
        "teacher": resolve_source(str(job.teacher)).digest,
        "tokens": job.tokens.digest,
        "seed": job.seed,
        "packages": versions(),
    }
    place = place_of(json.loads(json.dumps(parts)))
    kept = kept_fit(place)
    if kept is not None:
        fitter = DenseFitter(student, specs, set(), job.seed)
        for name in specs:
            fitter.restore(name, kept[0][name], None)
        return kept[1]
    began = time.perf_counter()
    statistics = measured(student, job, configuration) if configuration.calibrate else None
    fit(student, specs, statistics, job, configuration.reconstruct)
    record = {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes()}
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
        found[name] = {**matching[0], "bits": bits}
    return found


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
