"""Choose one way for every module so that the model fits a budget and loses as little as possible.

The multiple-choice knapsack problem: of the choices of each module, (bits, loss), take one, so that the bits sum to
at most the budget and the losses to the least. Losses add up because KL divergences of small, separate errors do.

Bits are counted in a common unit, and dynamic programming over the budget (Dudzinski and Walukiewicz, "Exact methods
for the knapsack problem and its generalizations", 1987) is exact where the unit divides all sizes. The linear
relaxation, solved on the lower convex hulls of the choices (Zemel, "An O(n) algorithm for the linear multiple choice
knapsack problem and related problems", 1984), is a loss that no choice can beat, so a result comes with its distance
from the best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CELLS = 1 << 17
"""Most units the budget is divided into; 200 modules of 4 choices then take a second and 27 MB."""


@dataclass(frozen=True)
class Choice:
    """One way to say one module."""

    bits: int
    loss: float
    """What the model loses by it, >= 0 up to noise."""


@dataclass(frozen=True)
class Allocation:
    """One choice per module."""

    chosen: tuple[int, ...]
    """Position of the choice among those of its module."""
    bits: int
    loss: float
    """Sum over the modules."""
    bound: float
    """No choice within the budget has a smaller loss; 0 <= loss - bound says how far from the best this may be."""


def allocate(modules: Sequence[Sequence[Choice]], budget: int) -> Allocation:
    """The choices with the least sum of losses within `budget` bits; of equal losses those with fewer bits.

    More bits never count as harmful: a choice that costs more and loses more than another one is passed over.

    Raises:
        ValueError: if a module has no choice, a loss is not finite, or the smallest choices together are over budget.
    """
    for choices in modules:
        if not choices or not all(math.isfinite(choice.loss) for choice in choices):
            raise ValueError("every module needs a choice, and every loss must be finite")
    smallest = sum(min(choice.bits for choice in choices) for choices in modules)
    if smallest > budget:
        raise ValueError(f"the smallest choices take {smallest} bits, and the budget is {budget}")
    fronts = [_front(choices) for choices in modules]
    places = _fill(modules, fronts, _program(modules, fronts, budget - smallest), budget)
    chosen = [front[place] for front, place in zip(fronts, places, strict=True)]
    taken = [choices[index] for choices, index in zip(modules, chosen, strict=True)]
    loss = math.fsum(choice.loss for choice in taken)
    bound = min(loss, _relaxed(modules, fronts, budget))  # rounding may put the bound an ulp above
    return Allocation(tuple(chosen), sum(choice.bits for choice in taken), loss, bound)


def _front(choices: Sequence[Choice]) -> list[int]:
    """The choices that no other beats in both, by ascending bits and so by descending loss."""
    kept: list[int] = []
    for index in sorted(range(len(choices)), key=lambda item: (choices[item].bits, choices[item].loss)):
        if not kept or choices[index].loss < choices[kept[-1]].loss:
            kept.append(index)
    return kept


def _program(modules: Sequence[Sequence[Choice]], fronts: Sequence[list[int]], room: int) -> list[int]:
    """A place in each front: the least sum of losses with `room` bits above the smallest choices.

    Extra bits are counted in whole units, rounded up, so that the result never is over budget.
    """
    extras = [
        [choices[index].bits - choices[front[0]].bits for index in front]
        for choices, front in zip(modules, fronts, strict=True)
    ]
    most = sum(extra[-1] for extra in extras)
    if most <= room:
        return [len(front) - 1 for front in fronts]
    unit = max(math.gcd(*(item for extra in extras for item in extra)), math.ceil(room / CELLS), 1)
    cells = room // unit + 1
    best = np.zeros(cells)
    picks = np.zeros((len(modules), cells), dtype=np.uint8 if max(map(len, fronts)) <= 256 else np.int32)
    for number, (choices, front) in enumerate(zip(modules, fronts, strict=True)):
        updated = best + choices[front[0]].loss
        for place, index in enumerate(front[1:], 1):
            shift = -(-extras[number][place] // unit)
            if shift >= cells:
                break
            with_it = best[: cells - shift] + choices[index].loss
            better = with_it < updated[shift:]
            updated[shift:][better] = with_it[better]
            picks[number, shift:][better] = place
        best = updated
    cell = int(best.argmin())  # the first of equals has the fewest bits
    places = []
    for number in reversed(range(len(modules))):
        place = int(picks[number, cell])
        places.append(place)
        cell -= -(-extras[number][place] // unit)
    return places[::-1]


def _fill(
    modules: Sequence[Sequence[Choice]], fronts: Sequence[list[int]], places: list[int], budget: int
) -> list[int]:
    """Spend what rounding to units left over: the step that gains most, as long as one fits."""
    places = list(places)
    left = budget - sum(
        choices[front[place]].bits for choices, front, place in zip(modules, fronts, places, strict=True)
    )
    while True:
        steps = []
        for number, (choices, front) in enumerate(zip(modules, fronts, strict=True)):
            now = choices[front[places[number]]]
            for place in range(places[number] + 1, len(front)):
                then = choices[front[place]]
                if then.bits - now.bits <= left:
                    steps.append((now.loss - then.loss, then.bits - now.bits, number, place))
        if not steps:
            return places
        _, bits, number, place = max(steps, key=lambda step: step[0])
        left -= bits
        places[number] = place


def _relaxed(modules: Sequence[Sequence[Choice]], fronts: Sequence[list[int]], budget: int) -> float:
    """The least sum of losses if choices could be mixed: a lower bound.

    Along its hull each module gains ever less per bit, so taking all hulls' steps by gain per bit is optimal.
    """
    left = budget
    losses: list[float] = []
    steps: list[tuple[float, int, float]] = []
    for choices, front in zip(modules, fronts, strict=True):
        hull = _hull([choices[index] for index in front])
        left -= hull[0].bits
        losses.append(hull[0].loss)
        for low, high in itertools.pairwise(hull):
            gain, bits = low.loss - high.loss, high.bits - low.bits
            steps.append((gain / bits, bits, gain))
    for rate, bits, gain in sorted(steps, reverse=True):
        losses.append(-gain if bits <= left else -rate * left)
        left -= bits
        if left <= 0:
            break
    return math.fsum(losses)


def _hull(points: Iterable[Choice]) -> list[Choice]:
    """The lower convex hull of points with ascending bits and descending losses."""
    hull: list[Choice] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(low: Choice, middle: Choice, high: Choice) -> bool:
    """Whether `middle` lies on or above the line from `low` to `high`."""
    return (low.loss - middle.loss) * (high.bits - low.bits) <= (low.loss - high.loss) * (middle.bits - low.bits)
