"""What a training loop is asked, where it stands, and what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class LoopSpec:
    """How to train. A step is one optimizer step."""

    steps: int
    seed: int
    accumulate: int = 1
    """Micro-batches per step; gradients are those of the mean over all their tokens."""
    warmup: int = 0
    schedule: str = "cosine"
    """`constant`, `linear` or `cosine`."""
    final_lr: float = 0.1
    """The last step's learning rate as a fraction of the peak."""
    clip: float | None = 1.0
    """Limit of the gradient's norm over all parameters; None for no limit."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    keep: str = "best"
    """`best`: the parameters of the lowest held-out loss, the start included; `last`: those of the last step."""
    ema: float | None = None
    """Decay of the moving average whose parameters are evaluated and kept; None: the parameters themselves."""
    evaluate_every: int = 50
    keep_every: int | None = None
    """After every so many steps `keep_step` is called; None: never."""
    patience: int | None = None
    """Training ends early after so many evaluations in a row without a lower held-out loss; None: it never does."""
    skip_limit: int = 10
    """Steps in a row whose loss or gradient is not finite, each of them skipped, after which training fails."""
    checkpoint_seconds: float = 30.0
    checkpoint_steps: int | None = None
    """Checkpoint after every so many steps too."""
    name: str = "train"
    """Folder of the checkpoints inside the stage's scratch folder: a stage may run several loops."""

    @classmethod
    def of(cls, config: Any, seed: int, **more: Any) -> LoopSpec:
        """From a training stage's config, whose options are called like these fields; `more` adds or replaces."""
        named = {item.name: getattr(config, item.name) for item in fields(cls) if hasattr(config, item.name)}
        return cls(**{**named, "seed": seed, "accumulate": config.batch.accumulate, **more})


@dataclass
class Progress:
    """Where a loop stands; all of it is in the checkpoint."""

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    start_tune: float | None = None
    last_tune: float | None = None
    best_tune: float | None = None
    best_step: int = 0
    stale: int = 0
    """Evaluations since the best."""
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopResult:
    """What training did. Losses are nats per token, or whatever `loss_of` and `evaluate` return."""

    steps: int
    skipped: int
    first_loss: float | None
    """Training loss of the first step."""
    last_loss: float | None
    start_tune: float | None
    """Held-out loss before the first step; None without `evaluate`."""
    last_tune: float | None
    best_tune: float | None
    best_step: int
    kept_step: int
    """The step whose parameters the tensors hold now."""
    tokens_per_second: float
    """Training tokens per second of this process, evaluation and checkpoints excluded."""
    seconds: float
    resumed_from: int | None

    def metrics(self) -> dict[str, Any]:
        """The figures for `report.json`: those that exist and are finite."""
        return {name: value for name, value in vars(self).items() if value is not None and math.isfinite(value)}
