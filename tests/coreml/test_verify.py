from __future__ import annotations

import numpy as np
import pytest

from a1q.coreml.reference import Reference, references, sequences
from a1q.coreml.runner import InterpreterBackend, make_runner
from a1q.coreml.thresholds import default_verify
from a1q.coreml.verify import compare, total_calls, verify_bundle
from a1q.errors import UsageError
from tests.coreml.bundles import bundle_of
from tests.coreml.models import FORMS, SCHEMES, decoder

LENGTHS = (36, 4, 8)


def expected_of(model, folder, lengths=LENGTHS) -> list[Reference]:
    return references(model, sequences(folder, model.config.vocab_size, *lengths))


@pytest.mark.parametrize(("name", "tied"), FORMS)
def test_every_scheme_computes_what_torch_computes(tmp_path, name, tied):
    model = decoder(SCHEMES[name], tie_word_embeddings=tied)
    bundle = bundle_of(model, tmp_path)
    report = verify_bundle(bundle, expected_of(model, tmp_path), default_verify())
    assert report.failures == []
    fp32, fp16 = report.figures["fp32"], report.figures["fp16"]
    assert fp32.cosine > 0.999999 and fp32.relative_error < 2e-3
    assert fp32.choice_agreement == fp32.greedy_agreement == fp32.decisive_agreement == 1
    assert fp32.overflows == fp16.overflows == 0
    assert 0.9999 < fp16.cosine < fp32.cosine
    assert fp16.decisive_agreement == 1 and fp16.decisive > 0.8


def test_biases_and_one_head_per_key(tmp_path):
    model = decoder(SCHEMES["rank-1"], attention_bias=True, num_key_value_heads=4)
    bundle = bundle_of(model, tmp_path)
    assert verify_bundle(bundle, expected_of(model, tmp_path), default_verify()).failures == []


def test_ticks_and_metrics(tmp_path):
    model, ticks = decoder(), []
    bundle = bundle_of(model, tmp_path)
    expected = expected_of(model, tmp_path)
    report = verify_bundle(bundle, expected, default_verify(), lambda: ticks.append(1))
    assert len(ticks) == total_calls(expected, 32)
    metrics = report.metrics()
    assert metrics["positions_fp16"] * 2 == len(ticks)
    assert {"cosine_fp32", "kl_max_fp16", "overflow_at_fp16"} <= set(metrics)


def test_without_unmerged_adapters_the_base_functions_are_meant(tmp_path):
    model, plain = decoder(SCHEMES["rank-1"], adapter=4), decoder(SCHEMES["rank-1"])
    bundle = bundle_of(model, tmp_path, adapter_functions=True)
    with_adapter, without = expected_of(model, tmp_path), expected_of(plain, tmp_path)
    wanted = default_verify()
    assert verify_bundle(bundle, with_adapter, wanted).failures == []
    assert verify_bundle(bundle, without, wanted, adapter="base").failures == []
    assert verify_bundle(bundle, without, wanted).failures
    assert verify_bundle(bundle, with_adapter, wanted, adapter="base").failures


def test_large_activations_survive_fp16(tmp_path):
    import torch

    model = decoder()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000).copy_(model.model.embed_tokens.weight.half().float())
    bundle = bundle_of(model, tmp_path)
    fp16 = verify_bundle(bundle, expected_of(model, tmp_path), default_verify()).figures["fp16"]
    assert fp16.overflows == 0
    assert fp16.cosine > 0.999


def test_overflow_fails_and_is_named(tmp_path):
    import torch

    model = decoder()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(30000).clamp_(-60000, 60000)
    bundle = bundle_of(model, tmp_path)
    report = verify_bundle(bundle, expected_of(model, tmp_path), default_verify())
    assert report.figures["fp32"].overflows == 0
    assert report.figures["fp16"].overflow_at.startswith("model: ")
    assert any("are not finite in fp16, the first in model: " in text for text in report.failures)
    assert report.metrics()["kl_fp16"] is None, "JSON has no infinity"


def test_each_threshold_is_judged(tmp_path):
    from dataclasses import replace

    model = decoder()
    bundle, expected = bundle_of(model, tmp_path), expected_of(model, tmp_path)
    for change, words in (
        ({"min_cosine": 1.0}, "the cosine in fp32 is 0.99999"),
        ({"min_cosine_fp16": 1.0}, "the cosine in fp16 is 0.9999"),
        ({"max_error": 1e-6}, "a logit in fp32 is off by"),
    ):
        [failure] = verify_bundle(bundle, expected, replace(default_verify(), **change)).failures
        assert words in failure


def test_a_continuation_of_another_model_is_not_chosen(tmp_path):
    model = decoder()
    bundle = bundle_of(model, tmp_path)
    [reference] = expected_of(model, tmp_path, (20, 8, 0))
    tokens = reference.tokens.copy()
    tokens[-3] = (tokens[-3] + 1) % 320
    changed = Reference(tokens, reference.prompt, reference.written, reference.logits, reference.rounded)
    found = compare(make_runner(bundle, InterpreterBackend(bundle, "fp32")), [changed])
    assert found.chosen[:6] == [True] * 5 + [False] and found.written == 5
    assert found.figures({}).greedy_agreement == 5 / 8


def test_what_the_context_can_not_hold(tmp_path):
    model = decoder()
    bundle = bundle_of(model, tmp_path)
    with pytest.raises(
        UsageError, match="130 tokens, prompt and continuation, do not fit the package's context of 128"
    ):
        verify_bundle(bundle, expected_of(model, tmp_path, (120, 10, 0)), default_verify())
    with pytest.raises(UsageError, match="nothing to compare"):
        verify_bundle(bundle, [], default_verify())


def test_a_device_is_compared_too(tmp_path):
    """Core ML's place is taken by a backend that is a little off."""
    model = decoder()
    bundle, expected = bundle_of(model, tmp_path), expected_of(model, tmp_path)

    class Noisy(InterpreterBackend):
        def run(self, *args):
            return {name: value + np.float32(3) * value.std() for name, value in super().run(*args).items()}

    report = verify_bundle(bundle, expected, default_verify(), device=Noisy(bundle, "fp16"))
    assert list(report.figures) == ["fp32", "fp16", "coreml"]
    assert [failure for failure in report.failures if "the cosine in coreml is" in failure]
    assert verify_bundle(bundle, expected, default_verify(), device=InterpreterBackend(bundle, "fp16")).failures == []
