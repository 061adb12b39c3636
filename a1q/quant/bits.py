"""Bits per weight of a model view, every overhead included. No torch."""

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
    """Bits per weight over the quantized linears; 16 for a model that has none."""
    quantized = [module for module in view.modules.values() if module.state != DENSE]
    weights = sum(module.shape[0] * module.shape[1] for module in quantized)
    return sum(map(module_bits, quantized)) / weights if weights else float(FLOAT_BITS)


def bpw_model(view: ModelView) -> float:
    """Bits per parameter over the whole model, unquantized parameters at 16 bits, tied ones counted once."""
    dense = view.parameters
    bits = 0
    for module in view.modules.values():
        if module.state != DENSE or module.adapter:
            dense -= module.shape[0] * module.shape[1]
            bits += module_bits(module)
    return (bits + FLOAT_BITS * dense) / view.parameters


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
        shapes = make_scheme(spec).part_shapes(module.shape, snapped=module.state == SNAPPED)
        dense -= rows * columns
        total += packed_size(rows * columns, spec["bits"])
        total += (2 if module.state == SNAPPED else 4) * sum(math.prod(shape) for shape in shapes.values())
        total += 4 * rows * columns * module.latent
    return total + wide * dense
