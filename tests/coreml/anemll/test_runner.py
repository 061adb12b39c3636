from __future__ import annotations

import numpy as np
import pytest

from a1q.coreml.anemll import programs
from a1q.coreml.anemll.runner import AnemllRunner
from a1q.coreml.runner import InterpreterBackend, make_runner
from tests.coreml.anemll.exported import exported, family
from tests.coreml.models import decoder
from tests.tiny import FAMILIES

TOKENS = np.random.default_rng(3).integers(0, 320, 128)
COSINE = {"fp32": 0.99999, "fp16": 0.9999}


def expected(model, tokens):
    """float32 [positions, vocabulary]."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor(np.asarray(tokens)[None])).logits[0].numpy()


def forced(runner, tokens, prompt):
    """Logits after the prompt and after every later token."""
    return np.stack([runner.prefill(tokens[:prompt]), *(runner.step(token) for token in tokens[prompt:])])


def cosine(found, wanted):
    return (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)


class Spy:
    """A backend that notes every call and may change what goes in."""

    def __init__(self, bundle, change=None):
        self.inner = InterpreterBackend(bundle, "fp32")
        self.name = "spy"
        self.change = change or (lambda part, inputs: inputs)
        self.calls = []

    def new_state(self):
        return self.inner.new_state()

    def run(self, part, function, inputs, state):
        self.calls.append((part, function, inputs))
        return self.inner.run(part, function, self.change(part, inputs), state)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_says_what_the_model_says(made, model_type, precision):
    model, bundle = made(model_type)
    backend = InterpreterBackend(bundle, precision)
    runner = make_runner(bundle, backend)
    assert isinstance(runner, AnemllRunner)
    wanted = expected(model, TOKENS[:64])
    found = np.concatenate([forced(runner, TOKENS[:33], 1), forced(runner, TOKENS[:64], 40)])
    wanted = np.concatenate([wanted[:33], wanted[39:]])
    assert cosine(found, wanted).min() >= COSINE[precision]
    best, second = np.sort(wanted, axis=1)[:, ::-1][:, :2].T
    sure = best - second > 4 * np.abs(found - wanted).max(1)
    same = found.argmax(1) == wanted.argmax(1)
    assert len(set(wanted.argmax(1))) >= 16 and not backend.overflows
    assert same.all() if precision == "fp32" else sure.mean() >= 0.8 and same[sure].all()


def test_calls_are_those_of_the_apps(made):
    bundle = made("qwen3")[1]
    spy = Spy(bundle)
    runner = AnemllRunner(bundle, spy)
    runner.prefill(TOKENS[:40])
    batch, chunks = "embeddings", ["ffn_1", "ffn_2"]
    assert [call[:2] for call in spy.calls] == [
        *[(batch, "main"), *((chunk, "prefill") for chunk in chunks)] * 2,
        *[(batch, "main"), *((chunk, "infer") for chunk in chunks), ("lm_head", "main")],
    ]
    second, again = spy.calls[4][2], spy.calls[7][2]
    assert np.array_equal(spy.calls[3][2]["input_ids"], [[*TOKENS[32:40], *[0] * 24]])
    assert np.array_equal(second["position_ids"], np.arange(32, 64)) and second["current_pos"] == [32]
    hidden = np.isneginf(second["causal_mask"][0, 0])
    assert np.array_equal(hidden, np.arange(128)[None] > np.arange(32, 64)[:, None])
    assert spy.calls[6][2]["input_ids"] == [[TOKENS[39]]] and again["position_ids"] == again["current_pos"] == [39]
    assert np.array_equal(again["causal_mask"][0, 0, 0] == 0, np.arange(128) <= 40)
    assert again["hidden_states"].shape == (1, 1, 64)


def mask(change):
    """A change of the mask that apps pass."""
    return lambda part, inputs: {**inputs, "causal_mask": change(inputs)} if "causal_mask" in inputs else inputs


def exact(inputs):
    """The mask of the Python program: as in the Swift apps, but `infer` sees its own position and those before."""
    visible = np.arange(128)[None] <= inputs["position_ids"][:, None]
    return np.where(visible, 0, -np.inf).astype(np.float32)[None, None]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("change", [exact, lambda inputs: 0 * exact(inputs).clip(-1, 0)], ids=["exact", "all shown"])
def test_a_mask_that_shows_more_or_less_of_the_future_changes_nothing(made, model_type, change):
    bundle = made(model_type)[1]
    usual = forced(AnemllRunner(bundle, Spy(bundle)), TOKENS[:60], 40)
    other = forced(AnemllRunner(bundle, Spy(bundle, mask(change))), TOKENS[:60], 40)
    assert np.array_equal(usual, other)


def test_a_chunk_that_trusts_the_mask_alone_sees_what_is_not_there(tmp_path, monkeypatch):
    from coremltools.converters.mil import Builder as mb

    def trusting(decoder, rows, given):
        repeated = mb.concat(values=[given] * decoder.architecture.group, axis=2)
        return dict.fromkeys(decoder.architecture.kinds, repeated)

    monkeypatch.setattr(programs, "_masks", trusting)
    model = family("llama")
    bundle = exported(model, tmp_path)
    runner = make_runner(bundle, InterpreterBackend(bundle, "fp32"))
    assert cosine(forced(runner, TOKENS[:64], 40), expected(model, TOKENS[:64])[39:]).min() < 0.999


def test_what_the_mask_hides_of_the_past_is_hidden(made):
    bundle = made("llama")[1]

    def without_first(inputs):
        hiding = exact(inputs)
        hiding[..., 1:, 0] = -np.inf
        return hiding if len(inputs["position_ids"]) > 1 else np.where(np.arange(128) == 0, -np.inf, hiding)

    usual = AnemllRunner(bundle, Spy(bundle)).prefill(TOKENS[:20])
    other = AnemllRunner(bundle, Spy(bundle, mask(without_first))).prefill(TOKENS[:20])
    assert np.isfinite(other).all() and np.abs(usual - other).max() > 0.01


def test_padding_may_be_anything(made):
    bundle = made("qwen3")[1]

    def rubbish(part, inputs):
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[1] == 1:
            return inputs
        return {"input_ids": np.concatenate([ids[:, :20], np.full((1, 12), 2**30, np.int32)], axis=1)}

    usual = forced(AnemllRunner(bundle, Spy(bundle)), TOKENS[:30], 20)
    other = forced(AnemllRunner(bundle, Spy(bundle, rubbish)), TOKENS[:30], 20)
    assert np.array_equal(usual, other)


def test_what_an_earlier_text_left_in_the_cache_is_not_seen(made):
    bundle = made("gemma3_text")[1]
    runner = AnemllRunner(bundle, Spy(bundle))
    fresh = forced(runner, TOKENS[:30], 20)
    runner.prefill(TOKENS)
    state = runner.state
    runner.reset = lambda: setattr(runner, "state", state)
    assert np.array_equal(forced(runner, TOKENS[:30], 20), fresh)


def test_the_context_can_be_filled_to_the_last_position(made):
    model, bundle = made("mistral")
    runner = make_runner(bundle, InterpreterBackend(bundle, "fp32"))
    wanted = expected(model, TOKENS)
    np.testing.assert_allclose(runner.prefill(TOKENS), wanted[-1], atol=5e-3)
    np.testing.assert_allclose(forced(runner, TOKENS, 126), wanted[125:], atol=5e-3)


@pytest.mark.parametrize("changes", [{"chunks": 1}, {"chunks": 3, "head_parts": 1}, {"residual_scale": 0.125}])
def test_chunks_splits_and_scale_leave_the_function_alone(tmp_path, changes):
    model = family("gemma3_text")
    bundle = exported(model, tmp_path, **changes)
    found = forced(make_runner(bundle, InterpreterBackend(bundle, "fp32")), TOKENS[:48], 40)
    assert cosine(found, expected(model, TOKENS[:48])[39:]).min() >= 0.99999


def test_the_functions_without_adapters_are_the_model_without_them(tmp_path):
    scheme = {"scheme": "lut", "bits": 4}
    model = decoder(scheme, adapter=2, tie_word_embeddings=False)
    bundle = exported(model, tmp_path, adapter_functions=True)
    backend = InterpreterBackend(bundle, "fp32")
    plain, base = (make_runner(bundle, backend, adapter).prefill(TOKENS[:40]) for adapter in (None, "base"))
    np.testing.assert_allclose(plain, expected(model, TOKENS[:40])[-1], atol=5e-3)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A = module.lora_B = None
    without = expected(model, TOKENS[:40])[-1]
    np.testing.assert_allclose(base, without, atol=5e-3)
    assert np.abs(plain - base).max() > 0.05


@pytest.mark.parametrize(
    "scheme",
    [
        {"scheme": "lut", "bits": 4, "granularity": "group", "channels": 16},
        {"scheme": "lut_lowrank", "bits": 2, "rank": 1, "fit": "absmax_svd"},
        {"scheme": "lut_lowrank", "bits": 2, "rank": 3, "fit": "absmax_svd"},
        {"scheme": "balanced", "bits": 2},
        {"scheme": "affine", "bits": 8},
    ],
)
def test_every_kind_of_weight(tmp_path, scheme):
    model = decoder(scheme, tie_word_embeddings=False)
    bundle = exported(model, tmp_path, head_parts=10)
    found = forced(make_runner(bundle, InterpreterBackend(bundle, "fp32")), TOKENS[:42], 40)
    assert cosine(found, expected(model, TOKENS[:42])[39:]).min() >= 0.99999


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ({"scheme": "lut", "bits": 4, "granularity": "group", "channels": 8}, 4),
        ({"scheme": "lut_lowrank", "bits": 6, "rank": 1, "fit": "absmax_svd"}, 6),
        ({"scheme": "lut_lowrank", "bits": 4, "rank": 2, "fit": "absmax_svd"}, 4),
    ],
)
def test_a_quantized_embedding_and_the_head_tied_to_it(tmp_path, scheme, bits):
    from a1q.quant.embedding import QuantEmbedding
    from a1q.quant.tied import swap_module

    model = family("gemma3_text")
    quantized = QuantEmbedding.quantize(model.model.embed_tokens, scheme, keep_latent=False)
    quantized.snap()
    swap_module(model, "model.embed_tokens", quantized)
    bundle = exported(model, tmp_path, head_parts=10)
    files = [bundle.part(name)["file"] for name in ("embeddings", "lm_head")]
    assert files == [f"gemma3_embeddings_lut{bits}.mlpackage", f"gemma3_lm_head_lut{bits}.mlpackage"]
    backend = InterpreterBackend(bundle, "fp32")
    found = forced(make_runner(bundle, backend), TOKENS[:42], 40)
    assert cosine(found, expected(model, TOKENS[:42])[39:]).min() >= COSINE["fp16"]  # gains of norms are fp16
    rows = backend.run("embeddings", "main", {"input_ids": np.arange(32, dtype=np.int32)[None]}, {})["hidden_states"]
    scaled = quantized.dequantize()[:32].detach().numpy() * 8  # the root of hidden
    np.testing.assert_allclose(rows[0], scaled, rtol=1e-6)
