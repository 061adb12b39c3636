"""a1q's methods: calibrate, fit, train, snap, as `configurations.py` says."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.configurations import Configuration
from benchmarks.quality.job import Job, Outcome
from benchmarks.quality.protocol import BATCH, CALIBRATION
from benchmarks.quality.settings import Setting, bits_by_module
from benchmarks.quality.teachers import linears

if TYPE_CHECKING:
    from a1q.quant.statistics import Statistics
    from a1q.training.reconstruction import ReconstructConfig

EMBEDDING = "model.embed_tokens"
GRADIENTS = 128
"""Sequences that gradients are measured on, as `calibrate` does by default."""


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
    began = time.perf_counter()
    statistics = measured(student, job) if configuration.calibrate else None
    training = list(configuration.train) if job.setting.steps else []
    fit(student, specs, statistics, job, configuration.reconstruct, keep_latent="weights" in training)
    seconds = {"fit": time.perf_counter() - began}
    facts: dict[str, Any] = {}
    if job.setting.steps:
        assert job.lr is not None
        modules = [module for _, module in quantized_modules(student)]
        for module in modules:
            module.straight_through_fp16 = True
        rates = {name: factor * job.lr for name, factor in configuration.train.items()}
        groups, _ = parameter_groups(student, modules, training, rates)
        tokens = torch.from_numpy(job.tokens.training)
        found = distill(student, teacher, tokens, groups, job.setting.steps, BATCH, seed=job.seed)
        seconds["train"] = found["seconds"]
        facts["losses"] = found["losses"]
    weights, bits = {}, 0
    for name, module in quantized_modules(student):
        module.snap()
        weights[f"{name}.weight"] = module.dequantize()
        bits += module.scheme.bits(module.shape)
    return Outcome(weights, bits, seconds, facts)


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


def measured(model: Any, job: Job) -> Statistics:
    """What every weight is multiplied with on the calibration tokens."""
    from a1q.quant.calibration import measure_statistics
    from a1q.quant.statistics import Statistics

    folder = job.scratch / "statistics"
    folder.mkdir()
    tokens = job.tokens.calibration[:CALIBRATION]
    measure_statistics(model, tokens, Path(folder), batch_size=8, gradient_sequences=GRADIENTS, seed=job.seed)
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
    keep_latent: bool,
) -> None:
    """Put quantized modules in the place of dense ones, as `quantize` does."""
    from a1q.engine.stage import StageContext
    from a1q.quant.fitter import DenseFitter
    from a1q.training.blockwise import fit_in_order

    ctx = StageContext("fit", None, job.seed, {}, out=job.scratch / "out", scratch=job.scratch / "fit")
    fitter = DenseFitter(student, specs, set(specs) if keep_latent else set(), job.seed)
    fit_in_order(ctx, student, list(specs), fitter, statistics, _Options(reconstruct), {})
