"""Weights in packages against the model's, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from a1q.coreml.stored import differences
from a1q.coreml.weights import decoder_weights
from tests.coreml.bundles import bundle_of
from tests.coreml.models import FORMS, SCHEMES, decoder


@pytest.mark.parametrize("layout", ["single", "anemll"])
@pytest.mark.parametrize(("name", "tied"), FORMS)
def test_every_form_is_stored_as_it_is(tmp_path, name, tied, layout):
    model = decoder(SCHEMES[name], tie_word_embeddings=tied)
    bundle = bundle_of(model, tmp_path, layout)
    assert differences(bundle, decoder_weights(model)) == []


def test_adapters_biases_and_a_cut_table(tmp_path):
    model = decoder(SCHEMES["rank-1"], adapter=2, attention_bias=True)
    bundle = bundle_of(model, tmp_path, head_parts=4, adapter_functions=True, residual_scale=0.25)
    assert differences(bundle, decoder_weights(model)) == []


def test_one_number_is_found_wherever_it_is(tmp_path):
    model = decoder(SCHEMES["channel-3"])
    bundle = bundle_of(model, tmp_path, head_parts=2)
    weights = decoder_weights(model)
    name = "model.layers.1.mlp.up_proj"
    linear = weights.linears[name]
    lut = linear.palette.lut.copy()
    lut[-1, 3] = -lut[-1, 3]
    other = replace(linear, palette=replace(linear.palette, lut=lut))
    [found] = differences(bundle, replace(weights, linears={**weights.linears, name: other}))
    assert found == "weights that differ from the model's: model_layers_1_mlp_up_proj_lut (1 numbers)"
    table = weights.embedding.dense.copy()
    table[319, 5] += 1
    [found] = differences(bundle, replace(weights, embedding=replace(weights.embedding, dense=table)))
    assert "embedding_2_weight (1 numbers)" in found


def test_a_matrix_that_is_nowhere(tmp_path):
    model = decoder(SCHEMES["rank-1"])
    bundle = bundle_of(model, tmp_path)
    weights = decoder_weights(model)
    more = {**weights.linears, "model.layers.2.mlp.up_proj": weights.linears["model.layers.1.mlp.up_proj"]}
    [found] = differences(bundle, replace(weights, linears=more))
    names = [f"model_layers_2_mlp_up_proj_{ending}" for ending in ("indices", "lut", "a")]
    assert found == f"weights that are in no package: {', '.join(names)} and 1 more"


def test_a_scale_that_was_dropped(tmp_path):
    model = decoder(SCHEMES["rank-1"])
    weights = decoder_weights(model)
    name = "model.layers.0.mlp.gate_proj"
    bare = {**weights.linears, name: replace(weights.linears[name], a=None, b=None)}
    bundle = bundle_of(model, tmp_path, weights=replace(weights, linears=bare))
    [found] = differences(bundle, weights)
    assert found == "weights that are in no package: model_layers_0_mlp_gate_proj_a, model_layers_0_mlp_gate_proj_b"


def test_a_matrix_that_points_to_the_numbers_of_another(tmp_path):
    """Both are one array then, and each is compared under its own name."""
    model = decoder(SCHEMES["tensor-2"])
    bundle = bundle_of(model, tmp_path)
    for function in bundle.packages["model"].program.functions.values():
        first, second = (
            next(op for op in function.operations if op.outputs[0].name == f"model_layers_{layer}_mlp_up_proj_weight")
            for layer in (0, 1)
        )
        second.indices._sym_val.val = first.indices._sym_val.val
    [found] = differences(bundle, decoder_weights(model))
    assert "model_layers_1_mlp_up_proj_indices (" in found and "layers_0" not in found
