"""SEQ and DWQ, in our own environment by their formulas (`trainable.py`)."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.quality.job import Job, Outcome
from benchmarks.quality.protocol import BATCH
from benchmarks.quality.settings import bits_by_module
from benchmarks.quality.teachers import linears


def run(job: Job, options: Mapping[str, Any]) -> Outcome:
    """Train `options["kind"]` (`seq` or `dwq`) with groups of `options["group_size"]` inputs.

    `options["rates"]` has each parameter set's learning rate as a multiple of the grid's.
    """
    import torch

    from a1q.models.checkpoint import load_model
    from a1q.quant.tied import swap_module
    from benchmarks.quality.loop import distill
    from benchmarks.quality.trainable import DwqLinear, SeqLinear, TrainableLinear

    teacher = load_model(job.teacher)
    student = copy.deepcopy(teacher)
    bits = bits_by_module(job.setting, [name for name, _ in linears(student)])
    modules: dict[str, TrainableLinear] = {}
    began = time.perf_counter()
    for name, dense in list(linears(student)):
        if options["kind"] == "dwq":
            modules[name] = DwqLinear(dense, bits[name], options["group_size"])
        elif bits[name] == 2:
            modules[name] = SeqLinear(dense, options["group_size"], options["start"])
        else:
            raise ValueError("SEQ has 2 bits")
        swap_module(student, name, modules[name])
    seconds = {"fit": time.perf_counter() - began}
    assert job.lr is not None
    groups = [
        {"params": [item for module in modules.values() for item in module.groups()[set_name]], "lr": factor * job.lr}
        for set_name, factor in options["rates"].items()
    ]
    tokens = torch.from_numpy(job.tokens.training)
    found = distill(student, teacher, tokens, groups, job.setting.steps, BATCH, seed=job.seed)
    seconds["train"] = found["seconds"]
    weights = {}
    for name, module in modules.items():
        module.round_stored()
        weights[f"{name}.weight"] = module.quantized().detach()
    return Outcome(weights, sum(module.bits for module in modules.values()), seconds, {"losses": found["losses"]})
