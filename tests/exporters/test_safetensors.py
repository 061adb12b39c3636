import copy
import json
import subprocess
import sys

import pytest
import torch

from a1q.engine.artifact import Artifact
from a1q.errors import Interrupted, StageError
from a1q.exporters.safetensors import SafetensorsConfig, SafetensorsExporter
from a1q.models.checkpoint import load_model
from a1q.models.view import read_view
from a1q.quant.linear import quantized_modules
from tests.exporters.conftest import context, save

CONFIG = SafetensorsConfig(shard_size="5GB", verify_tokens=32, min_cosine=0.9999)

PLAIN = """
import sys, torch
sys.modules["a1q"] = None  # a1q can't be imported here
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokens = AutoTokenizer.from_pretrained(folder)("Return a list of the words", return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
stored = next(AutoModelForCausalLM.from_pretrained(folder).parameters()).dtype
print(model(tokens).logits[0, -1].argmax().item(), stored)
"""


@pytest.fixture
def snapped(quantized_model):
    model = copy.deepcopy(quantized_model)
    for _, module in quantized_modules(model):
        module.snap()
    return model


def test_plain_transformers_loads_the_folder_without_a1q(snapped, dense_folder, tmp_path):
    artifact = save(snapped, tmp_path / "model", dense_folder)
    ctx = context(tmp_path / "out")
    SafetensorsExporter().export(artifact, CONFIG, ctx)
    assert ctx.metrics["cosine"] > 0.9999 and ctx.metrics["top1"] == 1.0
    done = subprocess.run([sys.executable, "-c", PLAIN, ctx.out], capture_output=True, text=True, check=True)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(dense_folder)("Return a list of the words", return_tensors="pt").input_ids
    expected = load_model(artifact.path)(tokens).logits[0, -1].argmax().item()
    assert done.stdout.split() == [str(expected), "torch.float16"]


def test_every_weight_is_the_dequantized_one_rounded_once(snapped, dense_folder, tmp_path):
    from safetensors.torch import load_file

    artifact = save(snapped, tmp_path / "model", dense_folder)
    ctx = context(tmp_path / "out")
    SafetensorsExporter().export(artifact, CONFIG, ctx)
    written = load_file(ctx.out / "model.safetensors")
    modules = dict(quantized_modules(load_model(artifact.path)))
    assert len(modules) == 14
    for name, module in modules.items():
        assert torch.equal(written[f"{name}.weight"], module.dequantize().half())
    assert not [name for name in written if "indices" in name or name == "lm_head.weight"]


def test_a_dense_model_goes_through_as_fp16(dense_folder, tmp_path):
    ctx = context(tmp_path / "out")
    SafetensorsExporter().export(Artifact("model", dense_folder, "test"), CONFIG, ctx)
    assert json.loads((ctx.out / "config.json").read_text())["dtype"] == "float16"
    before, after = read_view(dense_folder), read_view(ctx.out)
    assert after.modules == before.modules and after.parameters == before.parameters
    estimate = SafetensorsExporter().estimate(before, CONFIG)
    assert abs((ctx.out / "model.safetensors").stat().st_size / estimate - 1) < 0.05


def test_the_adapter_stands_beside_and_peft_adds_it(snapped, dense_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    for name, module in quantized_modules(snapped):
        if ".mlp." in name:
            module.set_adapter(torch.randn(2, module.in_features) * 0.1, torch.randn(module.out_features, 2) * 0.1, 4.0)
    artifact = save(snapped, tmp_path / "model", dense_folder)
    ctx = context(tmp_path / "out")
    SafetensorsExporter().export(artifact, CONFIG, ctx)
    tokens = torch.randint(320, (1, 16), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(ctx.out, dtype=torch.float32)
    without = base(tokens).logits
    with_adapter = PeftModel.from_pretrained(base, ctx.out / "adapter")(tokens).logits
    expected = load_model(artifact.path)(tokens).logits
    assert not torch.allclose(without, expected, atol=1e-2)
    torch.testing.assert_close(with_adapter, expected, atol=2e-2, rtol=2e-2)


def test_a_weight_beyond_fp16_is_named(dense_folder, tmp_path):
    model = load_model(dense_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    artifact = save(model, tmp_path / "model", dense_folder)
    with pytest.raises(StageError, match=r"layers\.1\.mlp\.up_proj\.weight does not fit FP16"):
        SafetensorsExporter().export(artifact, CONFIG, context(tmp_path / "out"))


def test_a_folder_that_computes_something_else_fails(snapped, dense_folder, tmp_path, monkeypatch):
    from a1q.models import baked

    honest = baked.fp16_state

    def broken(*arguments):
        state = honest(*arguments)
        state["model.layers.0.mlp.up_proj.weight"].neg_()
        return state

    monkeypatch.setattr(baked, "fp16_state", broken)
    artifact = save(snapped, tmp_path / "model", dense_folder)
    with pytest.raises(StageError, match="computes other logits"):
        SafetensorsExporter().export(artifact, CONFIG, context(tmp_path / "out"))


def test_a_stop_is_honoured(snapped, dense_folder, tmp_path):
    ctx = context(tmp_path / "out")
    ctx.should_stop = lambda: 15
    with pytest.raises(Interrupted):
        SafetensorsExporter().export(save(snapped, tmp_path / "model", dense_folder), CONFIG, ctx)


def test_unsnapped_modules_are_refused(quantized_model, dense_folder, tmp_path):
    artifact = save(quantized_model, tmp_path / "model", dense_folder)
    (refusal,) = SafetensorsExporter().refusals(read_view(artifact.path), CONFIG)
    assert "14 are quantized but not snapped" in refusal and "snap" in refusal
    assert SafetensorsExporter().refusals(read_view(dense_folder), CONFIG) == []
