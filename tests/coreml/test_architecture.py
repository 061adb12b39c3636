from __future__ import annotations

import pytest

from a1q.coreml.architecture import FAMILIES, FULL, SLIDING, head_parts, problems, read_architecture
from tests.tiny import tiny_family

QWEN = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window": 512, "rope_scaling": None,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
}  # fmt: skip
MISTRAL = {**QWEN, "model_type": "mistral", "sliding_window": None}


def test_qwen3_of_the_hub():
    assert problems(QWEN) == []
    architecture = read_architecture(QWEN)
    assert (architecture.group, architecture.head_dim, architecture.qk_norm, architecture.tied) == (2, 128, True, True)
    assert architecture.kinds == (FULL,)


def test_a_raw_gemma_config_says_little_of_what_is_meant():
    assert problems(GEMMA) == []
    architecture = read_architecture(GEMMA)
    assert architecture.tied, "by default"
    assert architecture.layer_kinds == (*(SLIDING,) * 5, FULL) * 3
    assert architecture.window == 512
    assert architecture.embedding_scale == 640**0.5
    assert architecture.norm_offset == 1
    assert architecture.post_norms
    assert architecture.query_scale == 1 / 16


@pytest.mark.parametrize("family", FAMILIES)
def test_completed_configs_are_understood(family):
    config = tiny_family(family).config.to_dict()
    assert problems(config) == []
    architecture = read_architecture(config)
    assert len(architecture.layer_kinds) == architecture.layers
    assert architecture.head_dim == 32


def test_windows():
    assert read_architecture(MISTRAL).window == 0
    assert read_architecture({**MISTRAL, "sliding_window": 4096}).layer_kinds == (SLIDING,) * 28
    unsaid = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert read_architecture(unsaid).window == 4096, "transformers fills that in"
    switched = {**QWEN, "use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 21}
    assert read_architecture(switched).layer_kinds == (FULL,) * 21 + (SLIDING,) * 7
    assert read_architecture({**switched, "use_sliding_window": False}).window == 0


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rotary_scaling_in_both_spellings(kind):
    assert problems({**QWEN, "rope_scaling": {"type": kind, "factor": 4.0}}) == []
    assert problems({**QWEN, "rope_parameters": {"rope_type": kind, "factor": 4.0}}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "knows no model type 'gpt2'; it supports: gemma3_text (Gemma 3 (text)), llama"),
        ({"model_type": None}, "knows no model type None"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rotary scaling 'dynamic'"),
        ({"rope_parameters": {FULL: {"rope_type": "longrope"}}}, "rotary scaling 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "looks back only"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 28}, "layers of type chunked_attention"),
        ({"use_sliding_window": True, "layer_types": [FULL] * 3}, "layer_types lists 3 layers"),
        ({"use_sliding_window": True, "layer_types": [SLIDING] * 28, "sliding_window": 0}, "sliding_window is 0"),
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


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": "long"}, {"rope_parameters": [1]}, {"sliding_window": "a", "use_sliding_window": True}],
)
def test_entries_of_types_that_no_model_has(changes):
    config = {**QWEN, "layer_types": [SLIDING] * 28, **changes}
    assert "config.json is not that of a qwen3 model" in problems(config)[0]
