"""Learning-rate schedules: linear warm-up, then constant, linear or cosine down to a fraction of the peak."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str, final: float) -> float:
    """What multiplies the peak learning rate at optimizer step `step` (0-based) of `steps`.

    Warm-up rises linearly from 1/(warmup + 1) at step 0 to 1 at step `warmup`; from there the factor falls to `final`
    at the last step, unless the schedule is constant.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - 1 - warmup)
    if schedule == "linear":
        return 1.0 - (1.0 - final) * done
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
