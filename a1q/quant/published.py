"""The published conversion of lut_lowrank to fewer bits and more ranks, kept to compare with.

k-means over the old table's *entries*, each counted once whatever its use; the old scale stays, and further ranks
start as small noise. What it leaves out (how often and at what scale an entry is used) is what a refit uses.

At the same bits the table stays too, and only the indices are new, derived from W / S: the published way from V1 to V2,
which forgets what the old ones were chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from a1q.quant.kmeans import lloyd, quantile_start

NOISE = 1e-3
"""Size of a new rank's scale relative to the first one's."""


def convert_published(parts: Mapping[str, Tensor], bits: int, rank: int, seed: int) -> dict[str, Tensor]:
    """All parts but the indices, with 2**bits entries and the given rank, from those of more entries or fewer ranks.

    Raises:
        ValueError: if the table would grow or ranks would be lost.
    """
    lut, a, g, b = (parts[name].detach().float() for name in ("lut", "a", "g", "b"))
    more = rank - len(g)
    if 2**bits > len(lut) or more < 0:
        raise ValueError(f"{len(lut)} entries and rank {len(g)} can't become {2**bits} entries and rank {rank}")
    entries = lut.sort().values[None]
    clustered = entries[0]
    if 2**bits < len(lut):
        clustered = lloyd(entries, torch.ones_like(entries), quantile_start(entries, 2**bits), rounds=100)[0]
    generator = torch.Generator().manual_seed(seed)

    def directions(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(lut.device)

    size = NOISE * g.abs().max() * a[:, 0].square().mean().sqrt() * b[0].square().mean().sqrt()
    root = size ** (1 / 3)
    return {
        "lut": clustered,
        "a": torch.cat([a, root * directions(len(a), more)], dim=1),
        "g": torch.cat([g, root.expand(more)]),
        "b": torch.cat([b, root * directions(more, b.shape[1])]),
        "gain": torch.ones_like(a[:, 0]),
    }
