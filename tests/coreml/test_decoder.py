"""What families and options change in the graph, against the Hugging Face model."""

from __future__ import annotations

from typing import Any

import pytest

from a1q.coreml.interpreter import Interpreter
from a1q.coreml.reference import references, sequences
from a1q.coreml.runner import InterpreterBackend, make_runner
from a1q.coreml.verify import compare
from tests.coreml.bundles import bundle_of
from tests.tiny import tiny_family

LENGTHS = (0, 0, 48)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma3_text", {}),
    "llama3": ("llama", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "biases": ("qwen2", {}),
    "all layers sliding": ("mistral", {"sliding_window": 16}),
    "the second layer sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
    ),
    "MLP biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
}


def rounded(model: Any) -> Any:
    """The model with its weights rounded to fp16, which is all a package can hold."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def figures(model: Any, folder: Any, precision: Any = "fp32", **options: Any) -> Any:
    """The package of a model, compared with it over 48 random tokens."""
    bundle = bundle_of(model, folder, **options)
    backend = InterpreterBackend(bundle, precision)
    expected = references(model, sequences(folder, model.config.vocab_size, *LENGTHS))
    return compare(make_runner(bundle, backend), expected).figures(backend.overflows)


@pytest.mark.parametrize("case", CASES)
def test_families_and_their_options(tmp_path, case):
    family, changes = CASES[case]
    found = figures(rounded(tiny_family(family, **changes)), tmp_path)
    assert found.cosine > 0.99999
    assert found.agreement == 1


@pytest.mark.parametrize("window", [15, 17])
def test_a_window_that_is_off_by_one_shows(tmp_path, monkeypatch, window):
    from dataclasses import replace

    from tests.coreml import bundles

    honest = bundles.read_architecture
    monkeypatch.setattr(bundles, "read_architecture", lambda config: replace(honest(config), window=window))
    assert figures(rounded(tiny_family("mistral", sliding_window=16)), tmp_path).cosine < 0.999


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    "spec",
    [
        {"scheme": "lut_lowrank", "bits": 4, "rank": 1, "fit": "absmax_svd"},
        {"scheme": "lut_lowrank", "bits": 4, "rank": 3, "fit": "absmax_svd"},
        {"scheme": "vector_lut", "bits": 3, "fit": "kmeans"},
    ],
    ids=["rank 1", "rank 3", "pairs"],
)
def test_embedding_and_tied_head_share_a_quantized_table(tmp_path, family, parts, spec):
    from a1q.quant.embedding import QuantEmbedding
    from a1q.quant.tied import swap_module

    model = rounded(tiny_family(family, pad_token_id=None))
    table = QuantEmbedding.quantize(model.model.embed_tokens, spec, keep_latent=False)
    table.snap()
    swap_module(model, "model.embed_tokens", table)
    assert figures(model, tmp_path, head_parts=parts).cosine > 0.9999


def test_one_copy_of_the_table_however_the_head_is_cut(tmp_path):
    model = rounded(tiny_family("qwen3"))
    one, four = (bundle_of(model, tmp_path / str(parts), head_parts=parts) for parts in (1, 4))
    sizes = [bundle.packages["model"].weight_bytes for bundle in (one, four)]
    assert 0 <= sizes[1] - sizes[0] < 1024, "headers of three more entries"


def test_the_norm_survives_20000(tmp_path):
    """Against float64, where squares of the activations would overflow fp16 at 256."""
    import numpy as np
    import torch

    model = rounded(tiny_family("qwen3"))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20000 / model.model.embed_tokens.weight.abs().max())
    rounded(model)
    bundle = bundle_of(model, tmp_path)
    interpreter = Interpreter(bundle.packages["model"].program, "fp16")
    inputs = {"input_ids": np.array([[7]], np.int32), "position": np.array([0], np.int32)}
    norm = next(
        step for step in interpreter.walk("infer", inputs, interpreter.new_state()) if step.step.type == "layer_norm"
    )
    found = norm.results[0].reshape(2, -1)[0]
    x = model.model.embed_tokens.weight[7].double()
    gain = model.model.layers[0].input_layernorm.weight.double()
    expected = (x / (x.square().mean() + 1e-6).sqrt() * gain).detach().numpy()
    assert float(x.detach().abs().max()) > 5000
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()
