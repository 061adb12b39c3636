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
    assert found == "weights that differ from the model's: model_layers_1_mlp_up_proj (1 numbers)"
    table = weights.embedding.dense.copy()
    table[319, 5] += 1
    [found] = differences(bundle, replace(weights, embedding=replace(weights.embedding, dense=table)))
    assert "embedding_2 (1 numbers)" in found


def test_a_matrix_that_is_nowhere(tmp_path):
    model = decoder(SCHEMES["rank-1"])
    bundle = bundle_of(model, tmp_path)
    weights = decoder_weights(model)
    more = {**weights.linears, "model.layers.2.mlp.up_proj": weights.linears["model.layers.1.mlp.up_proj"]}
    [found] = differences(bundle, replace(weights, linears=more))
    assert found == "weights that are in no package: model_layers_2_mlp_up_proj"
