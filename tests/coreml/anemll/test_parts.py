from __future__ import annotations

import pytest

from a1q.coreml.anemll import parts as module
from a1q.coreml.anemll.parts import outputs, parts
from a1q.coreml.architecture import read_architecture
from a1q.coreml.layouts import linear_bytes
from a1q.coreml.weights import decoder_weights
from tests.coreml.anemll.exported import exported, family, options
from tests.coreml.models import decoder

RANK1 = {"scheme": "lut_lowrank", "bits": 4, "rank": 1, "fit": "absmax_svd"}
OVERHEAD = 6000
"""Bytes of headers, alignment and masks in a tiny part."""


def of(model, **changes):
    architecture, weights = read_architecture(model.config.to_dict()), decoder_weights(model)
    return parts(architecture, weights, options(**changes)), weights


def test_parts_stand_in_the_order_of_a_call():
    found, _ = of(family("gemma3_text"), chunks=2)
    assert [(part.name, part.role, part.layers) for part in found] == [
        ("embeddings", "embeddings", (0, 0)),
        ("ffn_1", "ffn", (0, 1)),
        ("ffn_2", "ffn", (1, 3)),
        ("lm_head", "lm_head", (3, 3)),
    ]
    assert [dict(part.functions) for part in found] == [{"main": 32}, *[{"infer": 1, "prefill": 32}] * 2, {"main": 1}]


def test_chunks_are_as_few_as_the_limit_allows(monkeypatch):
    model = family("gemma3_text")
    found, weights = of(model, chunks=None)
    assert [part.file for part in found[1:-1]] == ["gemma3_FFN_PF_chunk_01of01.mlpackage"]
    layer = linear_bytes(weights, 0, 1)
    monkeypatch.setattr(module, "fitting_chunks", lambda sizes: module.even_chunks(len(sizes), 3))
    assert len(of(model, chunks=None)[0]) == 5
    assert layer * 3 == linear_bytes(weights, 0, 3)


@pytest.mark.parametrize(
    ("scheme", "ffn", "head"),
    [
        (None, "qwen_FFN_PF_chunk_01of02", "qwen_lm_head"),
        ({"scheme": "lut", "bits": 2}, "qwen_FFN_PF_lut2_chunk_01of02", "qwen_lm_head_lut2"),
        (RANK1, "qwen_FFN_PF_lut4_chunk_01of02", "qwen_lm_head_lut4"),
        ({"scheme": "affine", "bits": 4, "symmetric": False}, "qwen_FFN_PF_chunk_01of02", "qwen_lm_head"),
    ],
)
def test_files_say_the_bits_of_the_tables_and_sizes_are_those_of_the_bits(tmp_path, scheme, ffn, head):
    model = decoder(scheme, tie_word_embeddings=False)
    found, _ = of(model, head_parts=1)
    assert [found[1].file, found[-1].file] == [f"{ffn}.mlpackage", f"{head}.mlpackage"]
    bundle = exported(model, tmp_path, head_parts=1)
    for part in found:
        size = bundle.packages[part.name].weight_bytes
        assert part.theory_bytes <= size <= part.theory_bytes + OVERHEAD, part.name
    assert found[0].theory_bytes == 320 * 64 * 2


def test_mixed_bits_are_called_by_those_of_most_weights():
    import torch

    from a1q.quant.linear import QuantLinear, swap_module

    model = decoder()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and "layers" in name:
            bits = 2 if "mlp" in name else 4
            quantized = QuantLinear.quantize(layer, {"scheme": "lut", "bits": bits}, keep_latent=False)
            quantized.snap()
            swap_module(model, name, quantized)
    attention, mlp = 2 * 64 * 128 + 2 * 64 * 64, 3 * 64 * 96
    assert attention > mlp
    assert "_lut4_" in of(model)[0][1].file


def test_a_tied_head_is_stored_a_second_time(tmp_path):
    found, weights = of(family("qwen3"))
    assert weights.tied and found[0].theory_bytes == found[-1].theory_bytes == 320 * 64 * 2


def test_infer_and_prefill_share_one_copy_of_the_weights(made):
    bundle = made("llama")[1]
    for part in ("ffn_1", "ffn_2"):
        theory = bundle.part(part)["theory_bytes"]
        assert theory > 80_000
        assert bundle.packages[part].weight_bytes < 1.05 * theory


def test_outputs_are_those_asked_for_or_the_usual():
    model = family("llama")
    architecture, weights = read_architecture(model.config.to_dict()), decoder_weights(model)
    assert len(outputs(architecture, weights, options())) == 8
    assert outputs(architecture, weights, options(head_parts=2)) == ["logits1", "logits2"]


def test_functions_without_adapters_stand_beside_those_with_them():
    model = decoder({"scheme": "lut", "bits": 4}, adapter=2, tie_word_embeddings=False)
    found, _ = of(model, adapter_functions=True)
    chunk = {"infer": 1, "prefill": 32, "infer_base": 1, "prefill_base": 32}
    assert [dict(part.functions) for part in found] == [{"main": 32}, chunk, chunk, {"infer": 1, "infer_base": 1}]
    tied = decoder({"scheme": "lut", "bits": 4}, adapter=2)
    assert dict(of(tied, adapter_functions=True)[0][-1].functions) == {"main": 1}
