"""Pack indices of 1, 2, 3, 4, 6 or 8 bits into bytes and back.

The bits form one little-endian stream: index 0 takes the lowest bits of byte 0, an index may span two bytes, and
the last byte is padded with zeros. Groups of lcm(bits, 8) bits are handled at once: 8 indices at 1 bit (one byte),
4 at 2 bits (one byte), 8 at 3 bits (three bytes), 2 at 4 bits (one byte), 4 at 6 bits (three bytes).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1, 2, 3, 4, 6, 8)
"""The index widths, in bits, that Core ML look-up tables know."""


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` indices of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(indices: Tensor, bits: int) -> Tensor:
    """Pack a uint8 tensor of any shape, values below 2**bits, into uint8 [packed_size(numel, bits)].

    All arithmetic is in bytes: a table of 150 million entries passes through here, and wider temporaries would cost
    gigabytes.

    Raises:
        ValueError: if a value does not fit, or the width is none of `WIDTHS`.
    """
    import torch

    per_group, _ = _group(bits)
    flat = indices.reshape(-1)
    if flat.dtype != torch.uint8:
        raise ValueError(f"indices must be uint8, not {flat.dtype}")
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise ValueError(f"index {int(flat.max())} does not fit in {bits} bits")
    if bits == 8:
        return flat.clone()
    groups, octets_per_group = -(-flat.numel() // per_group), per_group * bits // 8
    padded = flat
    if flat.numel() % per_group:
        padded = torch.cat([flat, flat.new_zeros(groups * per_group - flat.numel())])
    entries = padded.view(groups, per_group)
    octets = flat.new_zeros(groups, octets_per_group)
    for position in range(per_group):
        octet, shift = divmod(position * bits, 8)
        octets[:, octet] |= entries[:, position] << shift  # what leaves the byte at the top is dropped
        if shift + bits > 8:
            octets[:, octet + 1] |= entries[:, position] >> (8 - shift)
    return octets.view(-1)[: packed_size(flat.numel(), bits)]


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The indices, uint8 of `shape`, from what `pack` wrote.

    Raises:
        ValueError: if the number of bytes does not fit the shape, or the padding bits are not zero.
    """
    import torch

    per_group, octets_per_group = _group(bits)
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        raise ValueError(f"{packed.numel()} bytes of {packed.dtype} can't hold {count} indices of {bits} bits")
    if bits == 8:
        return packed.reshape(shape).clone()
    used = count * bits % 8
    if used and int(packed.reshape(-1)[-1]) >> used:
        raise ValueError("padding bits of packed indices are not zero")
    groups = -(-count // per_group)
    octets = packed.reshape(-1)
    if octets.numel() % octets_per_group:
        octets = torch.cat([octets, octets.new_zeros(groups * octets_per_group - octets.numel())])
    octets = octets.view(groups, octets_per_group)
    indices = packed.new_empty(groups, per_group)
    for position in range(per_group):
        octet, shift = divmod(position * bits, 8)
        entry = octets[:, octet] >> shift
        if shift + bits > 8:
            entry |= octets[:, octet + 1] << (8 - shift)
        torch.bitwise_and(entry, 2**bits - 1, out=indices[:, position])
    return indices.view(-1)[:count].reshape(shape)


def _group(bits: int) -> tuple[int, int]:
    """Indices and bytes per group of whole bytes."""
    if bits not in WIDTHS:
        raise ValueError(f"index width must be one of {', '.join(map(str, WIDTHS))} bits, not {bits}")
    total = math.lcm(bits, 8)
    return total // bits, total // 8
