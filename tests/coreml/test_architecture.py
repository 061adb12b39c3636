from __future__ import annotations

import pytest

from a1q.coreml.architecture import head_parts, problems, read_architecture

QWEN = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


def test_qwen3_of_the_hub():
    assert problems(QWEN) == []
    architecture = read_architecture(QWEN)
    assert architecture.rope_theta == 1e6
    assert (architecture.group, architecture.head_dim, architecture.qk_norm, architecture.tied) == (2, 128, True, True)


def test_rotary_options_of_newer_configs():
    config = {**QWEN, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    del config["rope_theta"]
    assert problems(config) == []
    assert read_architecture(config).rope_theta == 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "knows no model type 'llama'; it supports: qwen3"),
        ({"model_type": None}, "knows no model type None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"num_key_value_heads": 5}, "16 heads can't share 5"),
        ({"head_dim": 80}, "head_dim 80 is not a multiple of 32"),
        ({"intermediate_size": 20000}, "intermediate_size is 20000; the Neural Engine takes dimensions up to 16384"),
    ],
)
def test_what_the_graph_can_not_say(change, message):
    assert any(message in problem for problem in problems({**QWEN, **change}))


def test_head_parts():
    assert head_parts(2048) == 1
    assert head_parts(16384) == 1
    assert head_parts(16386) == 2
    assert head_parts(151936) == 16
    assert head_parts(151936, 8) == 16
    assert head_parts(151936, 64) == 0
    assert head_parts(16411) == 0, "a prime"
