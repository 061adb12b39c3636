import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.data.split import place_of, side_of


def test_places_never_change():
    assert place_of("shutil") == pytest.approx(0.17389290442828553, abs=1e-12)


@given(st.text())
def test_places_are_fractions(key: str):
    assert 0 <= place_of(key) < 1


@given(st.text(), st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_sides_nest(key: str, one: float, two: float):
    small, large = sorted((one, two))
    place = place_of(key)
    if side_of(place, small) == "test":
        assert side_of(place, large) == "test"
    if side_of(place, large) == "train":
        assert side_of(place, small) == "train"


def test_sides_have_the_sizes_asked_for():
    sides = [side_of(place_of(f"document {number}"), 0.2) for number in range(4000)]
    assert sides.count("test") / 4000 == pytest.approx(0.1, abs=0.02)
    assert sides.count("tune") / 4000 == pytest.approx(0.1, abs=0.02)
