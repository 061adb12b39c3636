from __future__ import annotations

import numpy as np
import pytest

from a1q.coreml.runner import InterpreterBackend, Runner, make_runner
from a1q.errors import MismatchError
from tests.coreml.bundles import bundle_of
from tests.coreml.models import SCHEMES, decoder

TOKENS = np.random.default_rng(1).integers(1, 320, 128).tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = decoder(SCHEMES["rank-1"])
    bundle = bundle_of(model, tmp_path_factory.mktemp("runner"))
    return model, bundle, InterpreterBackend(bundle, "fp32")


@pytest.fixture
def runner(made) -> Runner:
    return make_runner(made[1], made[2])


def expected(model, tokens):
    import torch

    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1].numpy()


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 128])
def test_prefill_gives_the_logits_after_the_last_token(made, runner, count):
    found = runner.prefill(TOKENS[:count])
    assert found.shape == (320,) and runner.position == count
    np.testing.assert_allclose(found, expected(made[0], TOKENS[:count]), atol=2e-3)


def test_steps_continue_a_prompt_and_fill_the_context(made, runner):
    runner.prefill(TOKENS[:125])
    for count in (126, 127, 128):
        np.testing.assert_allclose(runner.step(TOKENS[count - 1]), expected(made[0], TOKENS[:count]), atol=2e-3)
    with pytest.raises(ValueError, match="the context of 128 positions is full"):
        runner.step(1)


def test_a_new_prompt_and_reset_forget(runner):
    first = runner.prefill(TOKENS[:40])
    runner.step(7)
    assert np.array_equal(runner.prefill(TOKENS[:40]), first)
    runner.reset()
    alone = runner.step(TOKENS[0])
    np.testing.assert_allclose(alone, runner.prefill(TOKENS[:1]), atol=1e-4)


@pytest.mark.parametrize("count", [0, 129])
def test_a_prompt_that_does_not_fit(runner, count):
    with pytest.raises(ValueError, match="does not fit a context of 128"):
        runner.prefill((TOKENS * 2)[:count])


def test_functions_that_are_not_there(made):
    with pytest.raises(MismatchError, match="no functions infer_base"):
        make_runner(made[1], made[2], "base")


def test_base_functions_are_the_model_without_its_adapter(tmp_path):
    model = decoder(SCHEMES["rank-1"], adapter=2)
    bundle = bundle_of(model, tmp_path, adapter_functions=True)
    backend = InterpreterBackend(bundle, "fp32")
    plain, base = make_runner(bundle, backend), make_runner(bundle, backend, "base")
    np.testing.assert_allclose(plain.prefill(TOKENS[:9]), expected(model, TOKENS[:9]), atol=2e-3)
    for module in model.modules():
        if getattr(module, "lora_A", None) is not None:
            module.lora_B.data.zero_()
    np.testing.assert_allclose(base.prefill(TOKENS[:9]), expected(model, TOKENS[:9]), atol=2e-3)
    np.testing.assert_allclose(base.step(5), expected(model, [*TOKENS[:9], 5]), atol=2e-3)


def test_a_large_head_comes_in_order(tmp_path):
    model = decoder(vocab_size=640, num_hidden_layers=1)
    bundle = bundle_of(model, tmp_path, head_parts=4)
    assert len(bundle.meta["outputs"]) == 4
    found = make_runner(bundle, InterpreterBackend(bundle, "fp16")).prefill(TOKENS[:9])
    np.testing.assert_allclose(found, expected(model, TOKENS[:9]), atol=0.1)
