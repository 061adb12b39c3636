"""Bits and bytes of a view against a count by hand and against real files."""

from pathlib import Path

import pytest
import torch

from a1q.models.checkpoint import save_model
from a1q.models.view import ModelView, ModuleView, read_safetensors_header, read_view
from a1q.quant.bits import bpw, bpw_model, disk_bytes, module_bits
from a1q.quant.linear import QuantLinear, quantized_modules, swap_module
from tests.tiny import tiny_model

SPEC = {"scheme": "lut_lowrank", "bits": 2, "rank": 1}


def test_counts_by_hand() -> None:
    dense = ModuleView("d", (10, 20))
    quantized = ModuleView("q", (8, 16), state="quantized", scheme=SPEC, adapter=2)
    view = ModelView({"d": dense, "q": quantized}, parameters=10 * 20 + 8 * 16 + 5)
    bits = 2 * 128 + 16 * (4 + 8 + 16) + 16 * 2 * (8 + 16)
    assert module_bits(quantized) == bits
    assert bpw(view) == bits / 128
    assert bpw_model(view) == (bits + 16 * 205) / 333
    assert bpw(ModelView({"d": dense}, 205)) == 16
    assert bpw_model(ModelView({"d": dense}, 205)) == 16


@pytest.mark.parametrize("snapped", [False, True])
@pytest.mark.parametrize(
    "schemes",
    [
        (SPEC, {"scheme": "lut", "bits": 3, "granularity": "channel"}),
        ({"scheme": "balanced", "bits": 2}, {"scheme": "balanced", "bits": 4, "granularity": "channel"}),
        ({"scheme": "vector_lut", "bits": 3}, {"scheme": "vector_lut", "bits": 1.5, "vector": 4, "rank": 2}),
        ({"scheme": "affine", "bits": 6}, {"scheme": "affine", "bits": 3, "symmetric": False}),
    ],
)
def test_disk_bytes_are_those_of_the_file(tmp_path: Path, snapped: bool, schemes: tuple[dict, dict]) -> None:
    model = tiny_model()
    for layer, scheme in enumerate(schemes):
        name = f"model.layers.{layer}.mlp.up_proj"
        module = QuantLinear.quantize(model.get_submodule(name), scheme, keep_latent=layer == 0)
        module.set_adapter(torch.ones(2, module.in_features), torch.ones(module.out_features, 2), 2.0)
        swap_module(model, name, module)
    if snapped:
        for _, module in quantized_modules(model):
            module.snap()
    save_model(model, tmp_path)
    header = read_safetensors_header(tmp_path / "model.safetensors")
    stored = sum(item["data_offsets"][1] - item["data_offsets"][0] for name, item in header.items() if name[0] != "_")
    assert disk_bytes(read_view(tmp_path)) == stored
