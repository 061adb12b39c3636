"""A residual scale changes no function and saves fp16 from what it can't hold; so does the form of RMSNorm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from a1q.coreml.activations import measure, residual_scale
from a1q.coreml.interpreter import Interpreter
from tests.coreml.models import program_of
from tests.tiny import FAMILIES, tiny_family

LENGTH = 16
TOKENS = np.random.default_rng(5).integers(0, 320, LENGTH).astype(np.int32)
TIED = [(model_type, tied) for model_type in FAMILIES for tied in (True, False)]


def half(model: Any) -> Any:
    """The model with fp16 numbers, as a package holds them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def loud(model_type: str, tied: bool) -> Any:
    """A tiny model whose residual stream passes 100,000, by what its MLPs add."""
    model = tiny_family(model_type, tie_word_embeddings=tied)
    with torch.no_grad():
        for layer in model.model.layers:
            if model_type == "gemma3_text":
                layer.post_feedforward_layernorm.weight *= 15000
            else:
                layer.mlp.down_proj.weight *= 16000
    return half(model)


def expected(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()[None]).logits[0].double().numpy()


def computed(model: Any, scale: float, precision: Any) -> tuple[Any, dict[str, int]]:
    """Logits [positions, vocabulary] of the program, token by token, and what overflowed in it."""
    program, calls, _ = program_of(model, residual_scale=scale)
    interpreter = Interpreter(program, precision)
    state = interpreter.new_state()
    rows = []
    for position in range(LENGTH):
        inputs = {"input_ids": TOKENS[None, position : position + 1], "position": np.array([position], np.int32)}
        found = interpreter.run("infer", inputs, state)
        rows.append(np.concatenate([found[name][0, 0] for name in calls.outputs]))
    return np.stack(rows).astype(np.float64), interpreter.overflows


def cosine(x: Any, y: Any) -> float:
    """The smallest of all positions."""
    return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min())


@pytest.mark.parametrize(("model_type", "tied"), TIED)
def test_the_scale_chosen_saves_what_would_overflow(model_type: str, tied: bool):
    model = loud(model_type, tied)
    peaks = measure(model, TOKENS[None])
    assert peaks.stream() > 1e5
    scale = residual_scale(peaks)
    assert scale < 1 and not peaks.beyond()

    reference = expected(model)
    _, overflows = computed(model, 1.0, "fp16")
    assert overflows
    found, overflows = computed(model, scale, "fp16")
    assert not overflows
    assert cosine(reference, found) > 0.9999
    margins = np.sort(reference, axis=1)[:, -1] - np.sort(reference, axis=1)[:, -2]
    sure = margins > 4 * np.abs(reference - found).max()
    assert sure.mean() >= 0.8
    assert (reference.argmax(1) == found.argmax(1))[sure].all()


@pytest.mark.parametrize(("model_type", "tied"), TIED)
def test_the_function_stays_the_same(model_type: str, tied: bool):
    """With an epsilon that matters: it must shrink with the square of the scale."""
    model = half(tiny_family(model_type, tie_word_embeddings=tied, rms_norm_eps=0.0625))
    plain, _ = computed(model, 1.0, "fp32")
    scaled, _ = computed(model, 0.125, "fp32")
    assert np.abs(scaled - plain).max() < 1e-4
    # The scale of the queries and products of gains are rounded to fp16 in both.
    assert np.abs(plain - expected(model)).max() < 2e-2


@pytest.mark.parametrize(("model_type", "tied"), TIED)
def test_it_stays_the_same_where_fp16_has_no_epsilon_as_small(model_type: str, tied: bool):
    """A quiet model at 1/64: epsilon would have to be 2.4e-10. What is left is the rounding of gains to fp16, and of
    the unscaled epsilon; an epsilon of 2^-24 would be 240 times too large."""
    model = tiny_family(model_type, tie_word_embeddings=tied, rms_norm_eps=1e-6)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.02)
    model = half(model)
    reference = expected(model)
    scaled, _ = computed(model, 2.0**-6, "fp32")
    assert np.abs(scaled - reference).max() < 1e-2 * reference.std()


@pytest.mark.parametrize("size", [1e-2, 1.0, 300.0, 20000.0])
def test_rms_norm_survives_large_activations_in_fp16(size: float):
    """y = x / sqrt(mean x² + eps) · gain, against float64; the squares of 20,000 are 6,000 times beyond fp16."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types

    from a1q.coreml.architecture import read_architecture
    from a1q.coreml.decoder import Decoder
    from a1q.coreml.toolkit import coremltools
    from a1q.coreml.weights import decoder_weights

    model = half(tiny_family("qwen3"))
    decoder = Decoder(read_architecture(model.config.to_dict()), decoder_weights(model), 8, 32)
    program = Program()
    inputs = {"x": Placeholder(sym_shape=(1, 64, 1, 8), dtype=types.fp16, name="x")}
    with Function(inputs, opset_version=coremltools().target.iOS18) as function:
        function.set_outputs([mb.identity(x=decoder.final_norm(function.inputs["x"]), name="y")])
    program.add_function("main", function)

    x = np.random.default_rng(1).uniform(-size, size, (1, 64, 1, 8)).astype(np.float16)
    x[0, 3, 0, :] = size
    interpreter = Interpreter(program, "fp16")
    found = interpreter.run("main", {"x": x.astype(np.float32)}, interpreter.new_state())["y"]
    assert not interpreter.overflows
    wide = x.astype(np.float64)
    gain = model.model.norm.weight.detach().double().numpy().reshape(1, -1, 1, 1)
    reference = wide / np.sqrt(np.square(wide).mean(1, keepdims=True) + model.config.rms_norm_eps) * gain
    assert np.abs(found - reference).max() < 2**-10 * np.abs(reference).max()
