"""The knapsack against trying everything."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.quant import allocation
from a1q.quant.allocation import Choice, allocate

BITS = st.integers(0, 40)
LOSSES = st.floats(0, 1, allow_subnormal=False)
CHOICES = st.lists(st.builds(Choice, BITS, LOSSES), min_size=1, max_size=4)
MODULES = st.lists(CHOICES, min_size=1, max_size=5)


def smallest(modules):
    return sum(min(choice.bits for choice in choices) for choices in modules)


def best_of_all(modules, budget):
    """(loss, bits) of the best of every combination."""
    return min(
        (math.fsum(choice.loss for choice in taken), sum(choice.bits for choice in taken))
        for taken in itertools.product(*modules)
        if sum(choice.bits for choice in taken) <= budget
    )


@given(MODULES, st.integers(0, 120))
def test_it_is_what_trying_everything_finds(modules, room):
    budget = smallest(modules) + room
    found = allocate(modules, budget)
    taken = [choices[index] for choices, index in zip(modules, found.chosen, strict=True)]
    assert found.bits == sum(choice.bits for choice in taken) <= budget
    assert found.loss == math.fsum(choice.loss for choice in taken)
    loss, _ = best_of_all(modules, budget)
    assert found.loss == pytest.approx(loss, rel=1e-12, abs=1e-15)
    assert found.bound <= loss + 1e-12


@given(MODULES, st.integers(0, 120), st.integers(2, 30))
def test_coarse_units_stay_within_budget_and_the_bound_holds(modules, room, cells):
    budget = smallest(modules) + room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "CELLS", cells)
        found = allocate(modules, budget)
    loss, _ = best_of_all(modules, budget)
    assert found.bits <= budget
    assert found.bound - 1e-12 <= loss <= found.loss + 1e-12


@given(MODULES, st.integers(0, 60), st.integers(0, 60))
def test_more_budget_never_loses_more(modules, room, more):
    budget = smallest(modules) + room
    assert allocate(modules, budget + more).loss <= allocate(modules, budget).loss + 1e-12


def test_equal_losses_take_the_fewer_bits():
    found = allocate([[Choice(8, 0.5), Choice(4, 0.5), Choice(2, 0.75)]], 100)
    assert found.chosen == (1,)


def test_more_bits_that_measured_worse_are_passed_over():
    noisy = [Choice(2, 0.5), Choice(3, 0.1), Choice(4, 0.11)]
    assert allocate([noisy, noisy], 8).chosen == (1, 1)


def test_a_budget_below_the_smallest_choices_is_refused():
    with pytest.raises(ValueError, match="smallest choices take 6 bits, and the budget is 5"):
        allocate([[Choice(2, 1.0), Choice(3, 0.0)], [Choice(4, 1.0)]], 5)


@pytest.mark.parametrize("choices", [[], [Choice(1, math.nan)], [Choice(1, math.inf)]])
def test_no_choice_and_no_number_are_refused(choices):
    with pytest.raises(ValueError, match="every module needs a choice, and every loss must be finite"):
        allocate([choices], 10)


def test_a_model_of_many_layers_is_near_its_bound_in_little_time():
    """28 layers of a real model's shapes with a rank-1 scale, and its embedding."""
    source = random.Random(0)
    shapes = [(2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (3072, 1024), (1024, 3072)]
    modules = []
    for rows, columns in [*shapes * 28, (151936, 1024)]:
        loss = source.lognormvariate(-6, 1.5)
        modules.append(
            [
                Choice(bits * rows * columns + 16 * (2**bits + rows + columns), loss * 5.0 ** (2 - bits))
                for bits in (2, 3, 4, 6)
            ]
        )
    weights = sum(rows * columns for rows, columns in [*shapes * 28, (151936, 1024)])
    started = time.perf_counter()
    for budget in (2.2, 2.5, 3.0, 4.5):
        found = allocate(modules, int(budget * weights))
        assert found.bits <= budget * weights
        assert found.bits > 0.999 * budget * weights
        assert found.loss - found.bound < 0.01 * found.loss
    assert time.perf_counter() - started < 20
