"""Every scheme's linear is one graph, forward and backward, and computes in it what it computes outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from a1q.quant.linear import QuantLinear

SPECS = [
    {"scheme": "lut_lowrank", "bits": 2},
    {"scheme": "lut_lowrank", "bits": 4, "rank": 2},
    {"scheme": "vector_lut", "bits": 2},
    {"scheme": "lut", "bits": 4},
    {"scheme": "balanced", "bits": 2},
    {"scheme": "affine", "bits": 4},
]


@pytest.mark.parametrize("latent", [False, True], ids=["still", "weights"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["scheme"])
def test_one_graph(spec, latent) -> None:
    torch.manual_seed(0)
    module = QuantLinear.quantize(nn.Linear(64, 32), spec, keep_latent=latent).requires_grad_(False)
    module.straight_through_fp16 = True
    trained = [part for name in ("weights", "scales", "lut") for part in module.trainable(name)]
    for part in trained:
        part.requires_grad_(True)
    x = torch.randn(8, 64)
    torch._dynamo.reset()
    results = []
    for forward in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        y = forward(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), trained)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
