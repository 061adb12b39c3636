"""What only a CUDA device shows; skipped without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.engine.stage import Runtime, StageContext
from tests.training.student import build, read_tensors, run_stage, stage_context

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return build(tmp_path_factory.mktemp("cuda"), tune=100)


def trained(folder: Path, inputs: dict[str, Artifact], device: str, amp: str, **options: Any) -> StageContext:
    ctx = stage_context("train", folder, inputs, **{"steps": 40, "batch": {"sequences": 16}, **options})
    losses: list[float] = ctx.meta.setdefault("losses", [])
    log = ctx.emit

    def emit(kind: str, values: Any) -> None:
        if kind == "progress":
            losses.append(values["loss"])
        log(kind, values)

    ctx.emit = emit
    run_stage(dataclasses.replace(ctx, runtime=Runtime(device=device, amp=amp, threads=1)))
    return ctx


def test_fp32_is_what_the_cpu_computes(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    asked = {"steps": 10, "trainable": ["scales"]}
    here, there = (trained(tmp_path / name, inputs, name, "no", **asked) for name in ("cuda", "cpu"))
    assert here.meta["losses"] == pytest.approx(there.meta["losses"], rel=1e-4)
    assert here.metrics["kl_after"] == pytest.approx(there.metrics["kl_after"], rel=1e-3)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("trainable", [["scales"], ["weights", "scales", "lut"]], ids=["scales", "all"])
def test_mixed_precision_ends_near_fp32(
    tmp_path: Path, inputs: dict[str, Artifact], amp: str, trainable: list[str]
) -> None:
    whole, mixed = (trained(tmp_path / kind, inputs, "cuda", kind, trainable=trainable).metrics for kind in ("no", amp))
    assert mixed["kl_after"] < 0.95 * mixed["kl_before"]
    assert mixed["kl_after"] == pytest.approx(whole["kl_after"], rel=0.1)
    assert mixed["skipped"] <= (8 if amp == "fp16" else 0), "the first scale is too large for some steps"


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_a_second_run_gives_the_same_bits(tmp_path: Path, inputs: dict[str, Artifact], amp: str) -> None:
    first, second = (trained(tmp_path / name, inputs, "cuda", amp, steps=6) for name in ("one", "two"))
    ours, theirs = (read_tensors(ctx.out) for ctx in (first, second))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
