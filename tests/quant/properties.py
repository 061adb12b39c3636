"""What holds for the snapped parts of any weight, in schemes with a hardware form."""

from __future__ import annotations

import torch

from a1q.quant.packing import pack
from a1q.quant.scheme import Blockwise, Palettized, Scheme


def check_stored_form(scheme: Scheme, weight: torch.Tensor, bits: int) -> None:
    """Fit and snap: idempotent, of the size counted, said alike by training and hardware, assigned to the nearest."""
    shape = (weight.shape[0], weight.shape[1])
    parts = scheme.fit(weight, None, 0)
    snapped = scheme.snap(parts)
    stored = scheme.dequantize(snapped)
    assert bool(torch.isfinite(stored).all())
    again = scheme.snap(snapped)
    assert again.keys() == snapped.keys()
    assert all(torch.equal(again[name], part) for name, part in snapped.items())
    assert torch.equal(scheme.weight(parts, None, True), stored)
    if scheme.hardware:
        assert torch.equal(said_by_hardware(scheme.hardware_form(snapped)), stored)
    packed = {name: pack(part, bits) if name in scheme.integers else part for name, part in snapped.items()}
    padded = 8 * sum(part.numel() * part.element_size() for part in packed.values())
    assert 0 <= padded - scheme.bits(shape) < 8 * len(scheme.integers)

    assigned = scheme.dequantize({**snapped, "indices": scheme.assign(snapped, weight)})
    codes = range(2**bits)
    every = [scheme.dequantize({**snapped, "indices": torch.full_like(snapped["indices"], code)}) for code in codes]
    nearest = (torch.stack(every) - weight).abs().amin(0)
    torch.testing.assert_close((assigned - weight).abs(), nearest, rtol=1e-5, atol=1e-6 * float(weight.abs().max()))


def said_by_hardware(form: Palettized | Blockwise) -> torch.Tensor:
    """The weight [out, in] by the definition of the form, in float32; checks the types of what it holds."""
    if isinstance(form, Blockwise):
        assert (form.codes.dtype, form.zero.dtype, form.scale.dtype) == (torch.uint8, torch.uint8, torch.float16)
        assert int(max(form.codes.max(), form.zero.max())) < 2**form.bits
        codes = form.codes.reshape(*form.scale.shape, -1).float()
        return (form.scale.float()[..., None] * (codes - form.zero.float()[..., None])).reshape(form.codes.shape)
    assert form.lut.dtype == torch.float16
    tables = form.lut.float().repeat_interleave(len(form.indices) // len(form.lut), 0)
    weight = tables.gather(1, form.indices.long())
    if form.a is None:
        return weight
    assert form.a.dtype == torch.float16
    return weight * (form.a.float() if form.b is None else form.a.float() @ form.b.float())
