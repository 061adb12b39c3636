import json
from pathlib import Path

import pytest

from a1q.errors import StageError
from a1q.models.view import read_safetensors_header, read_view
from tests.tiny import tiny_folder, tiny_model


def test_a_plain_folder(tmp_path: Path):
    view = read_view(tiny_folder(tmp_path / "m", num_hidden_layers=11))
    model = tiny_model(num_hidden_layers=11)
    assert view.parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = {name: tuple(item.weight.shape) for name, item in model.named_modules() if name.endswith("_proj")}
    assert {name: item.shape for name, item in view.modules.items() if item.kind == "linear"} == linears
    assert [name for name, item in view.modules.items() if item.kind == "embedding"] == ["model.embed_tokens"]
    assert view.tied and all(item.state == "dense" and item.scheme is None for item in view.modules.values())
    names = [name for name in view.modules if name.endswith("mlp.up_proj")]
    assert names == [f"model.layers.{number}.mlp.up_proj" for number in range(11)]


def test_an_untied_head_is_a_module(tmp_path: Path):
    view = read_view(tiny_folder(tmp_path / "m", tie_word_embeddings=False))
    assert not view.tied
    assert view.modules["lm_head"].shape == (320, 64) and view.modules["lm_head"].kind == "linear"


def test_shards_are_one_model(tmp_path: Path):
    whole = read_view(tiny_folder(tmp_path / "whole"))
    tiny_folder(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    view = read_view(tmp_path / "sharded")
    assert (view.modules, view.parameters) == (whole.modules, whole.parameters)


def test_a_model_artifact_with_quantized_modules(tmp_path: Path):
    from a1q.models.checkpoint import save_model
    from a1q.quant.linear import QuantLinear, swap_module

    model = tiny_model()
    name = "model.layers.1.mlp.down_proj"
    swap_module(model, name, QuantLinear.quantize(model.get_submodule(name), {"scheme": "lut", "bits": 4}))
    save_model(model, tmp_path)
    view = read_view(tmp_path)
    assert view.modules[name].state == "quantized" and view.modules[name].shape == (64, 96)
    assert view.modules[name].scheme["bits"] == 4
    assert view.modules["model.layers.0.mlp.down_proj"].state == "dense"
    assert view.parameters == sum(parameter.numel() for parameter in tiny_model().parameters())


def test_a_cut_file_is_named(tmp_path: Path):
    path = tiny_folder(tmp_path / "m") / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is (not|truncated)"):
            read_safetensors_header(path)
        with pytest.raises(StageError, match=r"model\.safetensors"):
            read_view(tmp_path / "m")


@pytest.mark.parametrize("header", [b"", b"[1]", b"nothing", b'{"x": 1}'])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, header: bytes):
    path = tiny_folder(tmp_path / "m") / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StageError, match=r"model\.safetensors"):
        read_view(tmp_path / "m")


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path):
    with pytest.raises(StageError, match=r"config\.json can't be read"):
        read_view(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(StageError, match=r"no \.safetensors file"):
        read_view(tmp_path)
