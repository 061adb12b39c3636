"""Models to disk and back, bit for bit, and damaged folders refused by name."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from a1q.errors import StageError
from a1q.models.checkpoint import load_model, save_model
from a1q.models.view import read_view
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.linear import QuantLinear
from a1q.quant.module import quantized_modules
from a1q.quant.tied import TiedHead, swap_module
from tests.tiny import tiny_family, tiny_folder, tiny_model, write_tokenizer

WEIGHTS, TABLE = "model.safetensors", "model.embed_tokens"
Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def quantized_model() -> Any:
    model = tiny_model()
    for name, spec, keep in (
        (Q, {"scheme": "lut_lowrank", "bits": 4, "rank": 2}, True),
        (UP, {"scheme": "vector_lut", "bits": 1.5, "vector": 4}, False),
        (DOWN, {"scheme": "lut", "bits": 2, "granularity": "channel"}, True),
    ):
        swap_module(model, name, QuantLinear.quantize(model.get_submodule(name), spec, keep_latent=keep))
    module = model.get_submodule(UP)
    module.set_adapter(torch.randn(2, module.in_features), torch.randn(module.out_features, 2), 3.0)
    model.get_submodule(Q).straight_through_fp16 = True
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize("snapped", [False, True])
def test_what_is_saved_loads_equal(tmp_path: Path, snapped: bool) -> None:
    model = quantized_model()
    if snapped:
        for _, module in quantized_modules(model):
            module.snap()
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float() if parameter.dtype == torch.float32 else parameter.data
    save_model(model, tmp_path)
    found = load_model(tmp_path)
    assert torch.equal(logits(found), logits(model))
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    loaded = dict(quantized_modules(found))
    assert list(loaded) == [Q, UP, DOWN]
    assert loaded[UP].adapter == {"rank": 2, "alpha": 3.0}
    assert loaded[Q].straight_through_fp16
    again = tmp_path / "again"
    again.mkdir()
    save_model(found, again)
    for name in (WEIGHTS, "config.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_on_disk_indices_are_packed_and_nothing_is_stored_twice(tmp_path: Path) -> None:
    save_model(quantized_model(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors[f"{UP}.indices"].shape == (96 // 4 * 64 * 6 // 8,)
    assert f"{UP}.weight" not in tensors
    assert f"{UP}.latent" not in tensors
    assert tensors[f"{Q}.latent"].dtype == torch.float32
    assert "lm_head.weight" not in tensors
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        header = json.loads(file.metadata()["a1q"])
    assert header["modules"][Q]["scheme"]["rank"] == 2
    assert header["modules"][UP]["shape"] == [96, 64]


def test_plain_folder_loads_in_float32_and_keeps_its_tokenizer(tmp_path: Path) -> None:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    found = load_model(tmp_path)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert torch.equal(logits(found), logits(model))
    second = tmp_path / "second"
    second.mkdir()
    save_model(found, second, tokenizer_from=tmp_path)
    assert (second / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert torch.equal(logits(load_model(second)), logits(found))


def test_untied_head(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    swap_module(model, "lm_head", QuantLinear.quantize(model.lm_head, {"scheme": "lut", "bits": 4}))
    save_model(model, tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model.eval()))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    save_model(quantized_model(), tmp_path)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("snapped", [False, True])
def test_a_quantized_embedding_loads_equal_and_stays_tied(tmp_path: Path, tied: bool, snapped: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    table = QuantEmbedding.quantize(model.model.embed_tokens, {"scheme": "lut_lowrank", "bits": 4, "rank": 2})
    swap_module(model, TABLE, table)
    if snapped:
        table.snap()
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float() if parameter.dtype == torch.float32 else parameter.data
    save_model(model, tmp_path)
    names = set(load_file(tmp_path / WEIGHTS))
    assert {f"{TABLE}.indices", f"{TABLE}.lut", f"{TABLE}.a", f"{TABLE}.b"} <= names
    assert not names & {f"{TABLE}.weight", f"{TABLE}.embed_scale", *(["lm_head.weight"] if tied else [])}
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        fact = json.loads(file.metadata()["a1q"])["modules"][TABLE]
    assert (fact["kind"], fact["shape"]) == ("embedding", [320, 64])
    found = load_model(tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert isinstance(found.lm_head, TiedHead) == tied
    assert not tied or found.lm_head.source is found.model.embed_tokens
    assert found.model.embed_tokens.padding_idx == model.model.embed_tokens.padding_idx == 0
    view = read_view(tmp_path)
    assert view.tied == tied and view.modules[TABLE].kind == "embedding"
    assert view.parameters == sum(parameter.numel() for parameter in tiny_model(tie_word_embeddings=tied).parameters())


def test_a_scaled_embedding_is_scaled_after_reading(tmp_path: Path) -> None:
    model = tiny_family("gemma3_text")
    swap_module(model, TABLE, QuantEmbedding.quantize(model.model.embed_tokens, {"scheme": "lut", "bits": 6}))
    save_model(model, tmp_path)
    found = load_model(tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert float(found.model.embed_tokens.embed_scale) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fact: fact.pop("kind"), "called a linear, the model's is a Embedding"),
        (lambda fact: fact.update(kind="table"), "called a table, the model's is a Embedding"),
    ],
)
def test_a_module_of_another_kind_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    model = tiny_model()
    swap_module(model, TABLE, QuantEmbedding.quantize(model.model.embed_tokens, {"scheme": "lut", "bits": 4}))
    save_model(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        header = json.loads(file.metadata()["a1q"])
    change(header["modules"][TABLE])
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={"a1q": json.dumps(header)})
    with pytest.raises(StageError, match=f"{TABLE} is {message}"):
        load_model(tmp_path)


def damaged(folder: Path, change: Any) -> Path:
    """Save the quantized model, then let `change` edit its tensors and its header."""
    save_model(quantized_model(), folder)
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        header = json.loads(file.metadata()["a1q"])
    change(tensors, header)
    save_file(tensors, folder / WEIGHTS, metadata={"a1q": json.dumps(header)})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.pop(f"{Q}.a"), f"lacks {Q}.a"),
        (lambda t, h: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t, h: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda t, h: t.update({f"{UP}.weight": torch.zeros(96, 64)}), f"unexpected {UP}.weight"),
        (lambda t, h: t.update({f"{Q}.lut": torch.zeros(8)}), r"q_proj.lut is \[8\], its scheme needs \[16\]"),
        (lambda t, h: t.update({"model.norm.weight": torch.zeros(3)}), r"norm.weight is \[3\], the model needs \[64\]"),
        (lambda t, h: t.update({f"{UP}.indices": torch.zeros(7, dtype=torch.uint8)}), r"indices is \[7\]"),
        (lambda t, h: h.update(format=9), "format 9; this a1q reads format 1"),
        (lambda t, h: h.pop("modules"), "header is damaged"),
        (lambda t, h: h["modules"][Q].update(state="melted"), "unknown state 'melted'"),
        (lambda t, h: h["modules"][Q]["scheme"].update(scheme="lut_lowrnk"), "did you mean 'lut_lowrank'"),
        (lambda t, h: h["modules"].update({"model.nowhere": h["modules"].pop(DOWN)}), "has no module model.nowhere"),
    ],
)
def test_differences_are_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(StageError, match=message):
        load_model(damaged(tmp_path, change))


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    save_model(quantized_model(), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for length, message in ((len(whole) - 1, "truncated"), (100, "not a complete"), (3, "not a safetensors")):
        (tmp_path / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(StageError, match=message):
            load_model(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(StageError, match=r"no \.safetensors file"):
        load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(StageError, match=r"no config\.json"):
        load_model(tmp_path)


def test_a_plain_folder_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(f"{UP}.weight")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StageError, match=f"lacks {UP}.weight"):
        load_model(folder)


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(StageError, match=r"model\.norm\.weight holds values that are not finite"):
        save_model(model, tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, a1q.models.checkpoint; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_config_that_contradicts_itself_is_told(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(StageError, match="is not understood"):
        load_model(folder)


def test_settings_beside_the_model_that_are_no_mapping(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text("[1, 2]")
    with pytest.raises(StageError, match="does not load"):
        load_model(folder)
