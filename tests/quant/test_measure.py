"""Errors put together by group and by layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1q.quant.measure import error_by_layer

SIZES = st.floats(0, 1e6)


@given(
    st.dictionaries(st.tuples(st.integers(0, 40), st.sampled_from(["mlp.up_proj", "q_proj"])), st.tuples(SIZES, SIZES))
)
def test_a_layer_is_the_sum_of_its_modules(errors: dict[tuple[int, str], tuple[float, float]]) -> None:
    named = {f"model.layers.{layer}.{name}": error for (layer, name), error in errors.items()}
    found = error_by_layer({**named, "lm_head": (5.0, 1.0), "model.embed_tokens": (7.0, 1.0)})
    assert set(found) == {str(layer) for layer, _ in errors}
    for layer in {layer for layer, _ in errors}:
        wrong, whole = map(sum, zip(*(error for (other, _), error in errors.items() if other == layer), strict=True))
        assert found[str(layer)] == (pytest.approx(wrong / whole) if whole else 0.0)
