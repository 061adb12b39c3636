"""What holds for the snapped parts of any weight, in schemes with a hardware form."""

from __future__ import annotations

import torch

from a1q.quant.packing import pack
from a1q.quant.scheme import Blockwise, Palettized, Scheme


def check_stored_form(scheme: Scheme, weight: torch.Tensor) -> None:
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
    width = scheme.index_bits
    packed = {name: pack(part, width) if name in scheme.integers else part for name, part in snapped.items()}
    padded = 8 * sum(part.numel() * part.element_size() for part in packed.values())
    assert 0 <= padded - scheme.bits(shape) < 8 * len(scheme.integers)

    assigned = scheme.dequantize({**snapped, "indices": scheme.assign(snapped, weight)})
    codes = range(2**scheme.index_bits)
    every = [scheme.dequantize({**snapped, "indices": torch.full_like(snapped["indices"], code)}) for code in codes]
    nearest = squares(torch.stack(every) - weight, scheme.vector).amin(0)
    missed, allowed = squares(assigned - weight, scheme.vector), 3e-6 * float(weight.abs().max())
    torch.testing.assert_close(missed.sqrt(), nearest.sqrt(), rtol=1e-5, atol=allowed)


def squares(difference: torch.Tensor, vector: int) -> torch.Tensor:
    """Squared errors [..., out, in] of what is chosen together: [..., out / d, in], d rows at a time."""
    return difference.square().unflatten(-2, (-1, vector)).sum(-2)


def said_by_hardware(form: Palettized | Blockwise) -> torch.Tensor:
    """The weight [out, in] by the definition of the form, in float32; checks the types of what it holds."""
    if isinstance(form, Blockwise):
        assert (form.codes.dtype, form.zero.dtype, form.scale.dtype) == (torch.uint8, torch.uint8, torch.float16)
        assert int(max(form.codes.max(), form.zero.max())) < 2**form.bits
        codes = form.codes.reshape(*form.scale.shape, -1).float()
        return (form.scale.float()[..., None] * (codes - form.zero.float()[..., None])).reshape(form.codes.shape)
    assert form.lut.dtype == torch.float16
    if form.lut.dim() == 3:
        looked_up = form.lut[0].float()[form.indices.long()].transpose(1, 2).flatten(0, 1)
        assert form.a is not None and form.b is not None
        return looked_up * (form.a.float() @ form.b.float())
    tables = form.lut.float().repeat_interleave(len(form.indices) // len(form.lut), 0)
    weight = tables.gather(1, form.indices.long())
    if form.a is None:
        return weight
    assert form.a.dtype == torch.float16
    return weight * (form.a.float() if form.b is None else form.a.float() @ form.b.float())
