from __future__ import annotations

import pytest

from benchmarks.quality import layer

SMALL = {
    **layer.SHAPE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}


def test_all_seven_linears_are_fitted_and_timed():
    found = layer.measure(SMALL, 2)
    assert len(found["seconds_each"]) == 7
    assert found["seconds"] == pytest.approx(sum(found["seconds_each"].values()), rel=0.2)
    assert found["peak_bytes"] > 10 * 2**20


def test_the_shape_is_that_of_qwen3():
    model = layer.build({**layer.SHAPE, "vocab_size": 16})
    shapes = [tuple(linear.weight.shape) for _, linear in layer.linears(model)]
    assert shapes == [(2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (3072, 1024), (1024, 3072)]
    assert all(spec["rank"] == 8 and spec["bits"] == 2 for spec in layer.specs().values())
