"""A small regression problem for the training loop; `python -m tests.training.toy FOLDER STEP` dies at that step."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from a1q.engine.stage import Runtime, StageContext
from a1q.training.device import prepare_torch
from a1q.training.loop import LoopResult, LoopSpec, run_loop, step_seed


def make_context(folder: Path, **changes: Any) -> StageContext:
    """A context whose logs are collected in `ctx.meta["logs"]`, progress in `ctx.meta["progress"]`."""
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {"id": "toy", "config": None, "seed": 5, "inputs": {}, "out": out, "scratch": scratch}
    ctx = StageContext(**{**values, "runtime": Runtime(threads=1), **changes})
    if "emit" not in changes:
        logs: list[str] = ctx.meta.setdefault("logs", [])
        progress: list[dict[str, float]] = ctx.meta.setdefault("progress", [])

        def emit(kind: str, data: Any) -> None:
            if kind == "log":
                logs.append(data["message"])
            else:
                progress.append(dict(data))

        ctx.emit = emit
    return ctx


class Toy:
    """Fit a random two-layer network; batches depend on (seed, step, micro) and dropout on the loop's own seed."""

    def __init__(self, seed: int = 5, dropout: float = 0.1):
        torch.manual_seed(seed)
        self.seed = seed
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 3)
        )
        self.target = torch.randn(6, 3)

    @property
    def state(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())

    def groups(self, lr: float = 1e-2) -> list[dict[str, Any]]:
        weights = [p for name, p in self.state.items() if name.endswith("weight")]
        biases = [p for name, p in self.state.items() if name.endswith("bias")]
        return [
            {"name": "weights", "params": weights, "lr": lr, "weight_decay": 0.1},
            {"name": "biases", "params": biases, "lr": lr / 2},
        ]

    def batch(self, seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
        return inputs, inputs @ self.target

    def loss_of(self, step: int, micro: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs, wanted = self.batch(step_seed(self.seed, step) + micro)
        return torch.nn.functional.mse_loss(self.model.train()(inputs), wanted), {"tokens": len(inputs)}

    def evaluate(self) -> float:
        inputs, wanted = self.batch(77, 64)
        return float(torch.nn.functional.mse_loss(self.model.eval()(inputs), wanted))

    def train(self, ctx: StageContext, **changes: Any) -> LoopResult:
        prepare_torch(ctx.runtime, self.seed)
        values: dict[str, Any] = {
            "steps": 20,
            "seed": self.seed,
            "warmup": 3,
            "evaluate_every": 6,
            "checkpoint_steps": 4,
        }
        return run_loop(
            ctx,
            parameter_groups=self.groups(),
            loss_of=self.loss_of,
            evaluate=self.evaluate,
            spec=LoopSpec(**{**values, **changes}),
            state=self.state,
            identity={"data": "toy"},
        )


def main(folder: str, last_step: str) -> None:
    def emit(kind: str, values: Any) -> None:
        if kind == "progress" and values["step"] == int(last_step):
            os.kill(os.getpid(), signal.SIGKILL)

    Toy().train(make_context(Path(folder), emit=emit))


if __name__ == "__main__":
    main(*sys.argv[1:])
