"""Whole models in one or two bytes a weight: their logits, their text, their memory."""

from pathlib import Path

import pytest
import torch
from torch import nn

from a1q.errors import StageError
from a1q.models.checkpoint import load_model, save_model
from a1q.models.compact import load_compact
from a1q.quant.compact import CompactEmbedding, CompactLinear, MappedEmbedding, held_bytes
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.linear import QuantLinear
from a1q.quant.module import quantized_modules
from a1q.quant.tied import swap_module
from tests.tiny import FAMILIES, tiny_family, tiny_folder, tiny_model

TABLE = "model.embed_tokens"
TABLES = [None, {"scheme": "lut_lowrank", "bits": 2}, {"scheme": "vector_lut", "bits": 2}, {"scheme": "lut", "bits": 4}]
MLP = {"scheme": "lut_lowrank", "bits": 2}
ATTENTION = {"scheme": "affine", "bits": 4, "granularity": "group", "group_size": 16}


def folder_of(path: Path, family: str, table: dict | None, snapped: bool, **changes) -> Path:
    model = tiny_family(family, **changes)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            spec = MLP if "mlp" in name else ATTENTION
            swap_module(model, name, QuantLinear.quantize(module, spec, keep_latent=not snapped))
    if table is not None:
        swap_module(model, TABLE, QuantEmbedding.quantize(model.get_submodule(TABLE), table, keep_latent=not snapped))
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.set_adapter(0.1 * torch.randn(2, layer.in_features), 0.1 * torch.randn(layer.out_features, 2), 3.0)
    for _, module in quantized_modules(model):
        if snapped:
            module.snap()
        else:
            module.straight_through_fp16 = True
    save_model(model, path)
    return path


def kl(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Nats per position."""
    p, q = exact.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("table", TABLES, ids=["dense", "lut_lowrank", "vector_lut", "lut"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_text_are_the_dense_models(tmp_path: Path, family: str, table: dict | None) -> None:
    folder = folder_of(tmp_path, family, table, snapped=family != "llama")
    dense, made = load_model(folder), load_compact(folder)
    tokens = torch.arange(60).reshape(3, 20)
    with torch.inference_mode():
        exact = dense(tokens).logits
        assert kl(exact, made(tokens).logits) < 1e-5
        assert kl(exact, dense(tokens.flip(1)).logits) > 0.1  # it would show
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(dense.generate(tokens[:1], **settings), made.generate(tokens[:1], **settings))
    assert not made.training
    assert isinstance(made.lm_head, CompactLinear)
    assert isinstance(made.get_submodule(TABLE), MappedEmbedding if table is None else CompactEmbedding)
    assert not [name for name, module in made.named_modules() if isinstance(module, nn.Linear | QuantLinear)]


def test_memory_is_what_the_bytes_add_up_to(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in names:
        made = QuantLinear.quantize(model.get_submodule(name), {"scheme": "balanced", "bits": 2}, keep_latent=False)
        made.snap()
        swap_module(model, name, made)
    save_model(model, tmp_path)
    made = load_compact(tmp_path)
    per_row = made.lm_head.held.planes.kind.PER_ROW
    linears = [made.get_submodule(name) for name in names]
    expected = sum(module.out_features * (module.in_features + per_row) for module in linears)
    expected += 2 * 320 * (64 + per_row)  # the head in two bytes; rows are looked up in the file
    others = [*made.parameters(), *made.buffers()]
    assert max(tensor.numel() for tensor in others) <= 64
    assert held_bytes(made) == expected + sum(tensor.nbytes for tensor in others)


def test_dense_linears_take_two_bytes_and_keep_biases(tmp_path: Path) -> None:
    model = tiny_family("qwen2", tie_word_embeddings=False)
    name = "model.layers.0.mlp.up_proj"
    swap_module(model, name, QuantLinear.quantize(model.get_submodule(name), MLP))
    save_model(model, tmp_path)
    dense, made = load_model(tmp_path), load_compact(tmp_path)
    held = {module.held.bytes_each for place, module in made.named_modules() if isinstance(module, CompactLinear)}
    assert held == {1, 2}
    assert torch.equal(made.model.layers[0].self_attn.q_proj.bias, dense.model.layers[0].self_attn.q_proj.bias)
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert kl(dense(tokens).logits, made(tokens).logits) < 1e-6


def test_weights_are_never_dense_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, "qwen3", None, snapped=True)

    def refused(*_: object) -> None:
        raise AssertionError("a whole weight was made")

    monkeypatch.setattr(QuantLinear, "weight", property(refused))
    monkeypatch.setattr(QuantEmbedding, "weight", property(refused))
    load_compact(folder)


def test_plain_folders_are_dense_and_damaged_ones_refused(tmp_path: Path) -> None:
    plain = tiny_folder(tmp_path / "plain")
    assert isinstance(load_compact(plain).lm_head, nn.Linear)
    (tmp_path / "own").mkdir()
    folder = folder_of(tmp_path / "own", "qwen3", None, snapped=True, hidden_size=32)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 320', '"vocab_size": 300'))
    with pytest.raises(StageError, match=r"embed_tokens.weight is \[320, 32\], the model needs \[300, 32\]"):
        load_compact(folder)
