import pytest
import torch

from a1q.errors import Interrupted
from a1q.exporters.packed import PackedConfig, PackedExporter
from a1q.models.checkpoint import load_model
from a1q.models.view import read_view
from a1q.quant.linear import quantized_modules
from tests.exporters.conftest import context, save


def test_what_is_written_is_the_model(quantized_model, dense_folder, tmp_path):
    artifact = save(quantized_model, tmp_path / "model", dense_folder)
    ctx = context(tmp_path / "out")
    PackedExporter().export(artifact, PackedConfig(latent="keep"), ctx)
    assert (ctx.out / "model.safetensors").read_bytes() == (artifact.path / "model.safetensors").read_bytes()
    assert read_view(ctx.out) == read_view(artifact.path)


def test_without_latents_the_weights_are_the_same_in_fewer_bytes(quantized_model, dense_folder, tmp_path):
    artifact = save(quantized_model, tmp_path / "model", dense_folder)
    ctx = context(tmp_path / "out")
    config = PackedConfig(latent="drop")
    PackedExporter().export(artifact, config, ctx)
    before, after = load_model(artifact.path), load_model(ctx.out)
    for (name, old), (_, new) in zip(quantized_modules(before), quantized_modules(after), strict=True):
        assert new.latent is None and old.latent is not None, name
        assert torch.equal(old.dequantize(), new.dequantize())
    size = (ctx.out / "model.safetensors").stat().st_size
    assert size < (artifact.path / "model.safetensors").stat().st_size / 2
    estimate = PackedExporter().estimate(read_view(artifact.path), config)
    header = int.from_bytes((ctx.out / "model.safetensors").read_bytes()[:8], "little") + 8
    assert size == header + estimate
    assert (ctx.out / "tokenizer.json").is_file()
    assert ctx.metrics["bytes"] >= size


def test_a_stop_is_honoured(quantized_model, dense_folder, tmp_path):
    ctx = context(tmp_path / "out")
    ctx.should_stop = lambda: 15
    with pytest.raises(Interrupted):
        PackedExporter().export(save(quantized_model, tmp_path / "model", dense_folder), PackedConfig("drop"), ctx)
