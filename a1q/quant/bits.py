"""Bits per weight of a model view, every overhead included. No torch.

Two figures: `bpw` is over the quantized linears, an untied head among them, so that recipes compare whatever they do to
the embedding; `bpw_model` is over every parameter, a quantized embedding (and with it a tied head, counted once) at its
own bits.
"""

from __future__ import annotations

import math

from a1q.models.view import DENSE, SNAPPED, ModelView, ModuleView
from a1q.quant.build import make_scheme
from a1q.quant.packing import packed_size

FLOAT_BITS = 16
"""What an unquantized number costs: models are shipped in fp16."""


def module_bits(module: ModuleView) -> int:
    """Bits of one module's weight in the state it is shipped in, its unmerged adapter included."""
    rows, columns = module.shape
    adapter = FLOAT_BITS * module.adapter * (rows + columns)
    if module.state == DENSE:
        return FLOAT_BITS * rows * columns + adapter
    return make_scheme(module.scheme or {}).bits(module.shape) + adapter


def bpw(view: ModelView) -> float:
    """Bits per weight over the quantized linears, embeddings left out; 16 for a model that has none."""
    quantized = [module for module in view.modules.values() if module.state != DENSE and module.kind == "linear"]
    weights = sum(module.shape[0] * module.shape[1] for module in quantized)
    return sum(map(module_bits, quantized)) / weights if weights else float(FLOAT_BITS)


def bpw_model(view: ModelView) -> float:
    """Bits per parameter over the whole model, unquantized parameters at 16 bits, tied ones counted once."""
    return model_bits(view) / view.parameters


def model_bits(view: ModelView) -> int:
    """Bits of every parameter of the model, in the states it is shipped in."""
    dense = view.parameters
    bits = 0
    for module in view.modules.values():
        if module.state != DENSE or module.adapter:
            dense -= module.shape[0] * module.shape[1]
            bits += module_bits(module)
    return bits + FLOAT_BITS * dense


def disk_bytes(view: ModelView) -> int:
    """Bytes of `model.safetensors` as `a1q.models.checkpoint` writes this view, headers and tokenizer left out."""
    snapped = any(module.state == SNAPPED for module in view.modules.values())
    wide, dense, total = (2 if snapped else 4), view.parameters, 0
    for module in view.modules.values():
        rows, columns = module.shape
        total += wide * module.adapter * (rows + columns)
        if module.state == DENSE:
            continue
        spec = module.scheme or {}
        scheme = make_scheme(spec)
        dense -= rows * columns
        total += packed_size(rows // scheme.vector * columns, scheme.index_bits)
        for part, shape in scheme.part_shapes(module.shape, snapped=module.state == SNAPPED).items():
            size = math.prod(shape)
            if part in scheme.integers:
                total += packed_size(size, scheme.width(part))
            else:
                total += (2 if module.state == SNAPPED else 4) * size
        total += 4 * rows * columns * module.latent
    return total + wide * dense
