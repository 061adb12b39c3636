"""Modules for reading only that hold their weights in one or two bytes a number and multiply fast: `a1q.quant.planes`.

A scheme that says its weight as tables between scales (`Scheme.table_form`) takes one byte where one byte says its
tables to within `TOLERANCE`: evenly spaced levels exactly, and more than half of all tables of four entries. All other
weights, those of many ranks or of a scale per group of inputs and dense ones too, take two bytes: each row whole
multiples of a 65278th of its range.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from a1q.models.view import SNAPPED
from a1q.quant.byte_tables import ByteTables, byte_tables, two_bytes
from a1q.quant.embedding import QuantEmbedding
from a1q.quant.linear import QuantLinear
from a1q.quant.module import QuantModule
from a1q.quant.packing import pack, unpack
from a1q.quant.planes import ROWS, Planes
from a1q.quant.scheme import TableForm

TOLERANCE = 4e-4
"""Relative error of a table that is taken for half the memory and twice the speed."""
MOST_RANKS = 4
"""Of scales around one product; with more, two bytes are faster."""
BLOCK = 1 << 20
"""Numbers of a weight that are made at a time."""


class CompactWeight:
    """Ŵ [out, in] in bytes: y = Σ_j rows_j ⊙ P (columns_j ⊙ x)."""

    def __init__(self, planes: Planes, rows: Tensor | None = None, columns: Tensor | None = None):
        """Take `rows` [out, r] only where r > 1 (one rank's are part of the planes), and `columns` [r, in]."""
        self.planes = planes
        self.rows, self.columns = (None if part is None else part.float().clone() for part in (rows, columns))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.planes.out_features, self.planes.in_features

    @property
    def bytes_each(self) -> int:
        """Bytes per number, 1 or 2."""
        return self.planes.count

    @property
    def nbytes(self) -> int:
        """All that is held."""
        return self.planes.nbytes + sum(part.nbytes for part in (self.rows, self.columns) if part is not None)

    def product(self, x: Tensor) -> Tensor:
        """x Ŵᵀ [..., out] for x [..., in], in the type of x; computed in float32, without gradients."""
        x32 = x.detach().float()
        if self.columns is None:
            y = self.planes.product(x32)
        elif self.rows is None:
            y = self.planes.product(x32 * self.columns[0])
        else:
            y = (self.planes.product(x32[..., None, :] * self.columns) * self.rows.T).sum(-2)
        return y.to(x.dtype)


def compact_weight(module: QuantModule, fast: bool | None = None) -> CompactWeight:
    """The weight of a quantized module as its forward pass uses it, without adapter."""
    parts = module.parts()
    if module.straight_through_fp16 and module.state != SNAPPED:
        parts = module.scheme.rounded(parts)
    with torch.no_grad():
        form = module.scheme.table_form({name: part.detach() for name, part in parts.items()})
        if form is not None and (form.columns is None or len(form.columns) <= MOST_RANKS):
            found = byte_tables(form.tables)
            # each number counts alike: that of all tables together
            size = form.tables.double().square().mean(1)
            error = ((found.error.square() * size).sum() / size.sum().clamp_min(1e-300)).sqrt()
            if error <= TOLERANCE:
                return _in_one_byte(form, found, fast)
            if form.columns is None or len(form.columns) == 1:
                return _in_two_bytes(form, fast)
        rows, columns = module.shape
        if says_rows(module):
            return weight_of_rows(module.rows, rows, columns, module.scheme.vector, fast)
        whole = module.weight.detach()
        return weight_of_rows(lambda start, stop: whole[start:stop], rows, columns, fast=fast)


def says_rows(module: QuantModule) -> bool:
    """Whether the scheme of `module` says rows by themselves."""
    parts = {name: part.detach() for name, part in module.parts().items()}
    return module.scheme.select_rows(parts, torch.arange(0)) is not None


def weight_of_rows(
    read: Callable[[int, int], Tensor], rows: int, columns: int, multiple: int = 1, fast: bool | None = None
) -> CompactWeight:
    """A weight [rows, columns] in two bytes. `read(start, stop)` gives rows of it, a multiple of `multiple`."""
    step = max(multiple, min(ROWS, BLOCK // columns) // multiple * multiple)
    blocks = (two_bytes(read(start, min(start + step, rows)).float()) for start in range(0, rows, step))
    return CompactWeight(Planes(_in_packs(blocks, step), fast=fast))


def _in_packs(blocks: Iterator[tuple[Tensor, Tensor]], step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of `step` rows put together to about `ROWS`."""
    held: list[tuple[Tensor, Tensor]] = []
    for block in blocks:
        held.append(block)
        if len(held) * step >= ROWS:
            yield _together(held)
            held = []
            give_back()
    if held:
        yield _together(held)
        give_back()


def give_back() -> None:
    """Let the system have memory that was freed between what is kept; else it counts as this process's for good."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _libc() -> Any:
    """The C library; nothing where it can't be had."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def _together(blocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    octets, scales = zip(*blocks, strict=True)
    return torch.cat(octets, dim=1), torch.cat(scales, dim=1)


def _in_one_byte(form: TableForm, found: ByteTables, fast: bool | None) -> CompactWeight:
    """Of tables that lie near enough to those that bytes say."""
    table = _table_of_row(form)
    scale, shift = found.scale[table], (found.scale * found.offset)[table]
    if form.shift is not None:
        shift = shift + form.shift
    ranks = form.rows if form.rows is not None and form.rows.shape[1] > 1 else None
    if form.rows is not None and ranks is None:
        scale, shift = scale * form.rows[:, 0], shift * form.rows[:, 0]
    planes = Planes(_looked_up(form, table, found.codes[None], scale[None]), shift if bool(shift.any()) else None, fast)
    return CompactWeight(planes, ranks, form.columns)


def _in_two_bytes(form: TableForm, fast: bool | None) -> CompactWeight:
    """Of any tables, and scales of one rank at most."""
    table = _table_of_row(form)
    octets, scales = two_bytes(form.tables)
    scale, shift = scales[:, table], form.shift
    if form.rows is not None:
        scale = scale * form.rows[:, 0]
        shift = None if shift is None else shift * form.rows[:, 0]
    return CompactWeight(Planes(_looked_up(form, table, octets, scale), shift, fast), None, form.columns)


def _table_of_row(form: TableForm) -> Tensor:
    """Which table serves each row, [out]."""
    rows, tables = len(form.indices), len(form.tables)
    numbers = torch.arange(rows)
    return numbers % tables if form.interleaved else numbers // (rows // tables)


def _looked_up(form: TableForm, table: Tensor, octets: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What `Planes` takes: the entries of `octets` [planes, n, L] at the form's indices, scales [planes, out]."""
    entries = octets.shape[2]
    flat = octets.reshape(len(octets), -1)
    step = max(1, BLOCK // form.indices.shape[1])

    def some() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(form.indices), step):
            rows = slice(start, start + step)
            places = form.indices[rows].to(torch.int32)
            if octets.shape[1] > 1:
                places += (table[rows, None] * entries).to(torch.int32)
            yield flat.index_select(1, places.view(-1)).view(len(flat), *places.shape), scales[:, rows]

    return _in_packs(some(), step)


class CompactLinear(nn.Module):
    """y = x Ŵᵀ + bias, plus (alpha / rank) · B (A x) of an unmerged adapter; gives no gradients."""

    bias: nn.Parameter | None
    lora_A: Tensor | None
    lora_B: Tensor | None

    def __init__(self, weight: CompactWeight, bias: nn.Parameter | None = None):
        """Take a weight and a bias [out] as they are."""
        super().__init__()
        self.held = weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        self.register_buffer("lora_A", None, persistent=False)
        self.register_buffer("lora_B", None, persistent=False)

    @classmethod
    def of(cls, module: QuantLinear, fast: bool | None = None) -> CompactLinear:
        """What computes as `module` does."""
        compact = cls(compact_weight(module, fast), module.bias)
        if module.lora_A is not None and module.lora_B is not None:
            compact.add_adapter(module.lora_A, module.lora_B, module.adapter_alpha / len(module.lora_A))
        return compact

    def add_adapter(self, lora_a: Tensor, lora_b: Tensor, factor: float = 1.0) -> None:
        """Add factor · B A to the weight, A [rank, in] and B [out, rank] standing beside it.

        Raises:
            ValueError: if they don't fit.
        """
        if lora_a.shape[1] != self.in_features or lora_b.shape != (self.out_features, len(lora_a)):
            shape = f"{self.out_features}x{self.in_features}"
            raise ValueError(f"adapter {tuple(lora_a.shape)}, {tuple(lora_b.shape)} does not fit {shape}")
        a, b = lora_a.detach().float(), lora_b.detach().float() * factor
        self.lora_A = a if self.lora_A is None else torch.cat([self.lora_A, a])
        self.lora_B = b if self.lora_B is None else torch.cat([self.lora_B, b], dim=1)

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        y = self.held.product(input)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.lora_A is not None and self.lora_B is not None:
            y = y + linear(linear(input, self.lora_A.to(input.dtype)), self.lora_B.to(input.dtype))
        return y

    def extra_repr(self) -> str:
        return f"{self.out_features}x{self.in_features}, {self.held.bytes_each} bytes a weight"


class CompactEmbedding(nn.Module):
    """What `QuantEmbedding` looks up, its indices packed as on disk: only the rows asked for are unpacked."""

    embed_scale: Tensor | None
    packed: Tensor

    def __init__(self, module: QuantEmbedding):
        """Take the parts of `module`, whose scheme says rows by themselves, and pack its indices."""
        super().__init__()
        parts = module.parts()
        if module.straight_through_fp16 and module.state != SNAPPED:
            parts = module.scheme.rounded(parts)
        self.scheme, self.shape = module.scheme, module.shape
        indices = parts.pop("indices")
        self.per_row = indices.shape[1]
        self.whole = self.per_row * self.scheme.index_bits % 8 == 0
        held = pack(indices, self.scheme.index_bits).view(len(indices), -1) if self.whole else indices
        self.register_buffer("packed", held, persistent=False)
        self.names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part.detach(), persistent=False)
        self.register_buffer("embed_scale", module.embed_scale, persistent=False)
        self.output_dtype = module.output_dtype

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        ids, places = input.unique(return_inverse=True)
        vectors = ids // self.scheme.vector
        rows = (vectors[:, None] * self.scheme.vector + torch.arange(self.scheme.vector)).reshape(-1)
        octets = self.packed.index_select(0, vectors)
        shape = (len(vectors), self.per_row)
        indices = unpack(octets.reshape(-1), self.scheme.index_bits, shape) if self.whole else octets
        # no memory: it only stands where rows are selected by the same rule for all parts
        stand_in = self.packed.new_zeros(()).expand(self.shape[0] // self.scheme.vector, self.per_row)
        parts = {"indices": stand_in, **{name: getattr(self, name) for name in self.names}}
        chosen = self.scheme.select_rows(parts, rows)
        assert chosen is not None
        made = self.scheme.dequantize({**chosen, "indices": indices}).view(len(vectors), self.scheme.vector, -1)
        found = made[torch.arange(len(vectors)), ids % self.scheme.vector]
        y = embedding(places, found).to(self.output_dtype)
        return y if self.embed_scale is None else y * self.embed_scale.to(y.dtype)


class MappedEmbedding(nn.Module):
    """A dense embedding whose rows are read from its file as they are looked up."""

    embed_scale: Tensor | None

    def __init__(self, rows: Tensor, embed_scale: Tensor | None, output_dtype: torch.dtype):
        """Take a tensor [vocabulary, hidden] that lies in a mapped file."""
        super().__init__()
        self.mapped = rows
        self.register_buffer("embed_scale", embed_scale, persistent=False)
        self.output_dtype = output_dtype

    def forward(self, input: Tensor) -> Tensor:
        y = embedding(input, self.mapped).to(self.output_dtype)
        return y if self.embed_scale is None else y * self.embed_scale.to(y.dtype)


def described(model: nn.Module) -> str:
    """How weights are held, in a few words for people; empty where none is compact."""
    each = [module.held.bytes_each for module in model.modules() if isinstance(module, CompactLinear)]
    counts = [f"{each.count(size)} at {size} byte{'s' * (size > 1)}" for size in sorted(set(each))]
    return f"weights in {held_bytes(model) / 1e6:,.1f} MB ({', '.join(counts)} each)" if each else ""


def held_bytes(model: nn.Module) -> int:
    """Bytes of all that `model` holds in memory: parameters, buffers and compact weights, each tied tensor once."""
    weights = {id(module.held): module.held for module in model.modules() if isinstance(module, CompactLinear)}
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.nbytes for tensor in tensors) + sum(weight.nbytes for weight in weights.values())
