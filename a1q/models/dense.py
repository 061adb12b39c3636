"""A model for reading only: dense weights where quantized modules were."""

from __future__ import annotations

from typing import Any


def write_out(model: Any) -> None:
    """Replace quantized linears and heads tied to a quantized embedding by dense ones of the same weights, adapters
    added: one dequantization instead of one a token. Quantized embeddings stay, as they look up single rows."""
    from torch import nn

    from a1q.quant.linear import QuantLinear
    from a1q.quant.tied import TiedHead, swap_module

    # From the end: a head's weight is the largest and takes three times its size to make, best while little is there.
    for name, module in reversed(list(model.named_modules())):
        if not isinstance(module, QuantLinear | TiedHead):
            continue
        weight = module.weight.detach()
        if isinstance(module, QuantLinear) and module.adapter is not None:
            weight = weight + module.adapter_delta()
        dense: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), module.bias
        swap_module(model, name, dense)
