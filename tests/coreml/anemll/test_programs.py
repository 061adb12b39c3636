from __future__ import annotations

import numpy as np
import pytest

from a1q.coreml.anemll.names import STATE
from a1q.coreml.interpreter import Interpreter
from tests.coreml.anemll.exported import exported, family

CONTEXT, BATCH, HIDDEN = 128, 32, 64
INT32, FLOAT16 = 0x20000 | 32, 0x10000 | 16


def arrays(features):
    """name -> (shape, data type) of a description."""
    return {
        feature.name: (tuple(feature.type.multiArrayType.shape), feature.type.multiArrayType.dataType)
        for feature in features
    }


@pytest.fixture(scope="module")
def bundle(made):
    return made("qwen3")[1]


def test_embeddings_take_one_id_or_a_batch(bundle):
    description = bundle.packages["embeddings"].description
    (ids,) = description.input
    shapes = [tuple(shape.shape) for shape in ids.type.multiArrayType.enumeratedShapes.shapes]
    assert arrays(description.input) == {"input_ids": ((1, 1), INT32)} and shapes == [(1, 1), (1, BATCH)]
    assert arrays(description.output) == {"hidden_states": ((), FLOAT16)}


@pytest.mark.parametrize(("part", "last"), [("ffn_1", False), ("ffn_2", True)])
def test_chunks_have_the_inputs_outputs_and_state_that_apps_name(bundle, part, last):
    description = bundle.packages[part].description
    assert description.defaultFunctionName == "infer"
    assert [function.name for function in description.functions] == ["infer", "prefill"]
    for function, positions in zip(description.functions, (1, BATCH), strict=True):
        assert arrays(function.input) == {
            "hidden_states": ((1, positions, HIDDEN), FLOAT16),
            "position_ids": ((positions,), INT32),
            "causal_mask": ((1, 1, positions, CONTEXT), FLOAT16),
            "current_pos": ((1,), INT32),
        }
        given = 1 if last else positions
        assert arrays(function.output) == {"output_hidden_states": ((1, given, HIDDEN), FLOAT16)}
        (state,) = function.state
        assert state.name == STATE
        assert tuple(state.type.stateType.arrayType.shape) == (4, 2, CONTEXT, 32)


def test_the_head_gives_equal_parts_of_the_vocabulary(bundle):
    description = bundle.packages["lm_head"].description
    assert arrays(description.input) == {"hidden_states": ((1, 1, HIDDEN), FLOAT16)}
    assert arrays(description.output) == {f"logits{part + 1}": ((1, 1, 20), FLOAT16) for part in range(16)}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_any_id_gives_a_row_of_the_table(made, precision):
    model, bundle = made("gemma3_text")
    interpreter = Interpreter(bundle.packages["embeddings"].program, precision)
    ids = np.full((1, BATCH), -(2**31), np.int32)
    ids[0, :4] = [5, 319, 320, 2**31 - 1]
    found = interpreter.run("main", {"input_ids": ids}, {})["hidden_states"]
    table = model.model.embed_tokens.weight.detach().numpy() * 8  # the root of hidden
    assert found.shape == (1, BATCH, HIDDEN)
    np.testing.assert_allclose(found[0, :4], table[[5, 319, 319, 319]], rtol=2e-3)
    np.testing.assert_allclose(found[0, 4:], np.tile(table[:1], (BATCH - 4, 1)), rtol=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_rows_that_see_nothing_are_finite(made, model_type, precision):
    interpreter = Interpreter(made(model_type)[1].packages["ffn_1"].program, precision)
    inputs = {
        "hidden_states": np.random.default_rng(0).normal(size=(1, BATCH, HIDDEN)).astype(np.float32),
        "position_ids": np.arange(BATCH, dtype=np.int32),
        "causal_mask": np.full((1, 1, BATCH, CONTEXT), -np.inf, np.float32),
        "current_pos": np.zeros(1, np.int32),
    }
    found = interpreter.run("prefill", inputs, interpreter.new_state())["output_hidden_states"]
    assert np.isfinite(found).all() and not interpreter.overflows


def test_a_chunk_writes_its_own_layers_of_the_cache_only(made):
    interpreter = Interpreter(made("qwen3")[1].packages["ffn_2"].program, "fp32")
    state = interpreter.new_state()
    inputs = {
        "hidden_states": np.ones((1, 1, HIDDEN), np.float32),
        "position_ids": np.array([7], np.int32),
        "causal_mask": np.zeros((1, 1, 1, CONTEXT), np.float32),
        "current_pos": np.array([7], np.int32),
    }
    interpreter.run("infer", inputs, state)
    written = {tuple(place) for place in np.argwhere(np.abs(state[STATE]).sum(axis=(1, 3)) > 0)}
    assert written == {(1, 7), (3, 7)}  # keys of layer 1, values of layer 1


def test_the_same_model_gives_the_same_bytes(tmp_path):
    first, second = (exported(family("qwen2"), tmp_path / name).folder for name in "ab")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
