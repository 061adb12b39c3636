import math

import pytest

from a1q.training.schedule import learning_rate_factor


def factors(steps: int, warmup: int, schedule: str, final: float) -> list[float]:
    return [learning_rate_factor(step, steps, warmup, schedule, final) for step in range(steps)]


def test_constant_schedule_with_warmup() -> None:
    assert factors(6, 3, "constant", 0.1) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_linear_schedule_ends_at_the_final_fraction() -> None:
    assert factors(5, 0, "linear", 0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_schedule_values() -> None:
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert factors(7, 2, "cosine", 0.1) == pytest.approx([1 / 3, 2 / 3, *expected])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (2, 1), (3, 3)])
def test_short_runs_stay_in_range(schedule: str, steps: int, warmup: int) -> None:
    assert all(0 < factor <= 1 for factor in factors(steps, warmup, schedule, 0.1))
