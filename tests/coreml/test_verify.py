from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from a1q.coreml import graph
from a1q.coreml.toolkit import coremltools
from a1q.coreml.verify import Reference, compare, prompt_tokens, reference_run
from a1q.coreml.weights import Palette, decoder_weights
from tests.coreml.models import FORMS, SCHEMES, decoder, package_of, program_of, saved
from tests.tiny import write_tokenizer

PROMPT = prompt_tokens(Path("nowhere"), 320, 40)


def reference(model, generate=6) -> Reference:
    return reference_run(model, PROMPT, generate)


@pytest.mark.parametrize(("name", "tied"), FORMS)
def test_every_scheme_computes_what_torch_computes(form, name, tied):
    model, package, layout = form(name, tied)
    expected = reference(model)
    fp32 = compare(package.program, layout, expected, "fp32")
    assert fp32.cosine > 0.999999
    assert fp32.max_error < 2e-3 * np.abs(expected.logits).max()
    assert fp32.greedy_agreement == 1
    assert fp32.overflows == 0
    fp16 = compare(package.program, layout, expected, "fp16")
    assert 0.9995 < fp16.cosine < fp32.cosine
    assert fp16.overflows == 0


def test_biases_and_one_head_per_key(tmp_path):
    model = decoder(SCHEMES["rank-1"], attention_bias=True, num_key_value_heads=4)
    package, layout = package_of(model, tmp_path)
    assert compare(package.program, layout, reference(model), "fp32").cosine > 0.999999


def test_unmerged_adapter(tmp_path):
    model, plain = decoder(SCHEMES["rank-1"], adapter=4), decoder(SCHEMES["rank-1"])
    package, layout = package_of(model, tmp_path)
    expected = reference(model)
    assert compare(package.program, layout, expected, "fp32").cosine > 0.999999
    assert np.abs(expected.logits - reference(plain).logits).max() > 0.1


def test_large_activations_survive_fp16(tmp_path):
    import torch

    model = decoder()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000).copy_(model.model.embed_tokens.weight.half().float())
    package, layout = package_of(model, tmp_path)
    fp16 = compare(package.program, layout, reference(model), "fp16")
    assert fp16.overflows == 0
    assert fp16.cosine > 0.999


def test_overflow_is_counted_and_named(tmp_path):
    import torch

    model = decoder()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(30000).clamp_(-60000, 60000)
    package, layout = package_of(model, tmp_path)
    fp16 = compare(package.program, layout, reference(model), "fp16")
    assert fp16.overflows > 0
    assert fp16.overflow_at
    assert compare(package.program, layout, reference(model), "fp32").overflows == 0


# -- mutations: each must show -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def quantized(form):
    return form("rank-1", True)[0]


@pytest.fixture(scope="module")
def expected(quantized):
    return reference(quantized)


MODULE = "model.layers.1.mlp.down_proj"


def mutated_weights(model, change):
    weights = decoder_weights(model)
    return replace(weights, linears={**weights.linears, MODULE: change(weights.linears[MODULE])})


def other_lut_entry(linear):
    lut = linear.palette.lut.copy()
    lut[0, 9] *= 1.5
    return replace(linear, palette=Palette(linear.palette.indices, lut))


def other_index(linear):
    indices = linear.palette.indices.copy()
    indices[:, 5] = (indices[:, 5] + 8) % 16
    return replace(linear, palette=Palette(indices, linear.palette.lut))


def no_row_scale(linear):
    return replace(linear, a=np.ones_like(linear.a))


def no_column_scale(linear):
    return replace(linear, b=np.ones_like(linear.b))


@pytest.mark.parametrize("change", [other_lut_entry, other_index, no_row_scale, no_column_scale])
def test_another_weight_shows(tmp_path, quantized, expected, change):
    package, layout = package_of(quantized, tmp_path, mutated_weights(quantized, change))
    assert compare(package.program, layout, expected, "fp32").cosine < 0.9999


@pytest.fixture
def cosine_with(tmp_path, quantized, expected, monkeypatch):
    """The cosine of a package that was built with one name of `target` replaced."""

    def cosine(target, name, replacement):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, replacement)
            program, layout, _ = program_of(quantized)
        return compare(saved(program, tmp_path).program, layout, expected, "fp32").cosine

    return cosine


@pytest.fixture
def builder():
    coremltools()
    from coremltools.converters.mil import Builder

    return Builder


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_off_by_one_shows(cosine_with, builder, shift):
    compared = builder.less_equal

    def shifted(x, y):
        return compared(x=x, y=builder.add(x=y, y=np.int32(shift)))

    assert cosine_with(builder, "less_equal", shifted) < 0.999


def slot_of(builder, decoder, cache, slot):
    spec = decoder.architecture
    size = [1, spec.kv_heads, decoder.layout.context, spec.head_dim]
    return builder.slice_by_size(x=cache, begin=[slot, 0, 0, 0], size=size)


def test_swapped_states_show(cosine_with, builder):
    remember = graph._Decoder._remember

    def swapped(self, x, slot):
        remember(self, x, slot)
        return slot_of(builder, self, self.cache, slot ^ 1)

    assert cosine_with(graph._Decoder, "_remember", swapped) < 0.999


def test_a_stale_state_shows(cosine_with, builder):
    remember = graph._Decoder._remember

    def stale(self, x, slot):
        before = self.cache
        remember(self, x, slot)
        return slot_of(builder, self, before, slot)

    assert cosine_with(graph._Decoder, "_remember", stale) < 0.999


def test_a_dropped_write_shows(cosine_with, builder):
    """The values of the last layer are used, but never reach the state."""
    update = builder.coreml_update_state
    calls = itertools.count(1)

    def drop(state, value):
        return value if next(calls) % 4 == 0 else update(state=state, value=value)

    assert cosine_with(builder, "coreml_update_state", drop) < 0.999


def test_prompt_is_text_where_there_is_a_tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    tokens = prompt_tokens(tmp_path, 320, 300)
    assert len(tokens) == 300
    from tokenizers import Tokenizer

    assert "reads a text file" in Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(tokens)
    assert prompt_tokens(tmp_path, 10, 20) != tokens[:20], "ids beyond the vocabulary are not used"
