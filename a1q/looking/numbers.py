"""What the numbers of quantized modules look like: use of their tables, ranges of their scales, fit to fp16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from a1q.quant.module import QuantModule

LARGEST, SMALLEST = 65504.0, 2.0**-14
"""Of fp16: the largest number, and the smallest that keeps all its digits."""
PIECE = 1 << 22
"""Numbers that are looked at together."""


@dataclass(frozen=True)
class TableUse:
    """How a module uses its look-up tables."""

    tables: int
    entries: int
    """Of one table."""
    dead: int
    """Entries of all tables that no index names."""
    entropy: float
    """Bits per index that its tables' use carries, at most log2 of `entries`."""


@dataclass(frozen=True)
class ScaleRange:
    """Of the scales S [out, in] that stand beside the tables."""

    least: float
    """The smallest |S|."""
    most: float
    """The largest |S|."""
    negative: float
    """Share below zero."""


@dataclass(frozen=True)
class Half:
    """How a module's trained numbers fit fp16."""

    beyond: int
    """Numbers beyond 65504, which would become infinite."""
    subnormal: float
    """Share of numbers that are not zero and below 2⁻¹⁴, which lose digits."""
    rounding: float
    """Root of the mean squared relative error of rounding, over numbers that are not zero; 0 once snapped."""


@dataclass(frozen=True)
class Numbers:
    """All of a module."""

    finite: bool
    """Whether all of Ŵ is, and all of its parts, also those that nothing names."""
    largest: float
    """The largest |Ŵ| that is finite."""
    tables: TableUse | None
    """None where its scheme knows no tables."""
    scales: ScaleRange | None
    half: Half


def numbers_of(module: QuantModule) -> Numbers:
    """Look at one quantized module."""
    import torch

    parts = module.parts()
    with torch.no_grad():
        weight = module.dequantize()
        form = module.scheme.table_form(parts)
    use = scales = None
    if form is not None:
        use = table_use(form.indices, form.tables, form.interleaved)
        scales = scale_range(form.rows, form.columns, module.shape)
    largest, finite = largest_of(weight)
    finite = finite and all(largest_of(part)[1] for part in parts.values() if part.is_floating_point())
    return Numbers(finite, largest, use, scales, half_of(part.detach() for part in parts.values()))


def table_use(indices: Tensor, tables: Tensor, interleaved: bool) -> TableUse:
    """Count which entries `indices` [out, in] name; rows take the tables [n, L] in blocks, or in turns."""
    import torch

    count, entries = tables.shape
    grouped = indices.reshape(-1, count, indices.shape[1]).transpose(0, 1) if interleaved else indices
    codes = grouped.reshape(count, -1).long() + entries * torch.arange(count, device=indices.device)[:, None]
    hits = torch.bincount(codes.flatten(), minlength=count * entries).reshape(count, entries).double()
    shares = hits / hits.sum(1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-300).log2()).sum(1).mean()
    return TableUse(count, entries, int((hits == 0).sum()), float(entropy))


def scale_range(rows: Tensor | None, columns: Tensor | None, shape: tuple[int, int]) -> ScaleRange | None:
    """Of S = rows columns [out, in], as far as they are finite; None where there are no scales.

    A row block at a time, as S is a weight's size.
    """
    import torch

    if rows is None and columns is None:
        return None
    rank = rows.shape[1] if rows is not None else columns.shape[0]  # type: ignore[union-attr]
    rows = torch.ones(shape[0], rank) if rows is None else rows.detach().float().cpu()
    columns = torch.ones(rank, shape[1]) if columns is None else columns.detach().float().cpu()
    least, most, negative = float("inf"), 0.0, 0
    for start in range(0, shape[0], 1024):
        s = rows[start : start + 1024] @ columns
        s = s[torch.isfinite(s)]
        if len(s):
            least, most = min(least, float(s.abs().min())), max(most, float(s.abs().max()))
            negative += int((s < 0).sum())
    return None if least > most else ScaleRange(least, most, negative / (shape[0] * shape[1]))


def largest_of(values: Tensor) -> tuple[float, bool]:
    """The largest magnitude of those numbers that are finite, 0 if none is, and whether all are."""
    import torch

    largest, every = 0.0, True
    for piece in values.detach().flatten().split(PIECE):
        size = piece.float().abs()
        finite = torch.isfinite(size)
        every &= bool(finite.all())
        largest = max(largest, float(size.where(finite, 0).max()))
    return largest, every


def half_of(tensors: Iterable[Tensor]) -> Half:
    """How the floating numbers of all tensors fit fp16; a piece at a time."""
    import torch

    count = beyond = small = known = 0
    squares = 0.0
    for tensor in tensors:
        for piece in tensor.flatten().split(PIECE) if tensor.is_floating_point() else ():
            values = piece.float()
            size = values.abs()
            some = values[(size > 0) & (size <= LARGEST) & torch.isfinite(values)]
            squares += float(((some.half().float() - some) / some).double().square().sum())
            count, known = count + len(values), known + len(some)
            beyond += int((size > LARGEST).sum())
            small += int(((size > 0) & (size < SMALLEST)).sum())
    return Half(beyond, small / max(count, 1), math.sqrt(squares / known) if known else 0.0)


def together(found: Mapping[str, Numbers]) -> dict[str, Any]:
    """Of several modules: sums, extremes and means, as JSON has them."""
    items = list(found.values())
    tables = [item.tables for item in items if item.tables]
    scales = [item.scales for item in items if item.scales]
    result: dict[str, Any] = {
        "modules": len(items),
        "not_finite": [name for name, item in found.items() if not item.finite],
        "largest": max(item.largest for item in items),
        "fp16_beyond": sum(item.half.beyond for item in items),
        "fp16_subnormal": max(item.half.subnormal for item in items),
        "fp16_rounding": max(item.half.rounding for item in items),
    }
    if tables:
        every = sum(item.tables * item.entries for item in tables)
        result |= {
            "tables": sum(item.tables for item in tables),
            "entries": sorted({item.entries for item in tables}),
            "dead_entries": sum(item.dead for item in tables),
            "dead_share": sum(item.dead for item in tables) / every,
            "entropy": sum(item.entropy for item in tables) / len(tables),
        }
    if scales:
        result |= {
            "scale_least": min(item.least for item in scales),
            "scale_most": max(item.most for item in scales),
            "scale_negative": max(item.negative for item in scales),
        }
    return result
