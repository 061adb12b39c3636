from hypothesis import given
from hypothesis import strategies as st

from a1q.training.batches import batch_rows


@given(st.integers(0, 2**63 - 1), st.integers(1, 40), st.integers(1, 50))
def test_every_pass_visits_each_row_once(seed: int, size: int, count: int) -> None:
    walk = [row for start in range(0, 3 * size * count, count) for row in batch_rows(seed, start, count, size)]
    for turn in range(3):
        assert sorted(walk[turn * size : (turn + 1) * size]) == list(range(size))


@given(st.integers(0, 2**63 - 1), st.integers(0, 500), st.integers(1, 30), st.integers(1, 20))
def test_rows_depend_on_the_position_alone(seed: int, start: int, count: int, size: int) -> None:
    whole = batch_rows(seed, start, count, size)
    assert whole == [row for offset in range(count) for row in batch_rows(seed, start + offset, 1, size)]


def test_seeds_and_passes_differ() -> None:
    assert batch_rows(1, 0, 20, 20) != batch_rows(2, 0, 20, 20)
    assert batch_rows(1, 0, 20, 20) != batch_rows(1, 20, 20, 20)
