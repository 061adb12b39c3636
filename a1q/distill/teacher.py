"""Ask a teacher about token sequences and write its answers as cache shards.

Shards are written one by one into a scratch folder, each durably and with its digest, and moved to the artifact at the
end. What a shard holds depends on the seed and its own number only, so a run that was killed computes the missing
ones and ends with the same bytes as one that never was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from a1q.distill.cache import PARTS, id_bytes
from a1q.distill.negatives import draw_offsets, offset_bytes, offsets_to_ids
from a1q.engine.artifact import sha256_file
from a1q.engine.files import copy_file, fsync_path, write_atomic
from a1q.errors import StageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FEW = 64
"""Up to one in so many, torch.topk keeps a short sorted list instead, which is fast."""
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.int32}
"""Type of a stored id or offset, by its bytes."""


def shard_names(part: str, sequences: int, shard_sequences: int) -> list[str]:
    """File names of a part's shards, in order."""
    return [f"{part}-{number:05d}.safetensors" for number in range(-(-sequences // shard_sequences))]


def write_shards(
    model: torch.nn.Module,
    parts: dict[str, np.ndarray],
    *,
    folder: Path,
    top_k: int,
    random_negatives: int,
    shard_sequences: int,
    batch: int,
    seed: int,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda message: None,
) -> dict[str, list[str]]:
    """Write every shard that `folder` doesn't hold undamaged yet.

    Args:
        model: a causal language model; `model(input_ids=...).logits` is [B, L, V].
        parts: part name (`train`, `tune`) -> tokens, integers [n, L].
        folder: where shards of an earlier attempt with the same arguments may lie.
        batch: sequences per forward pass; a batch never crosses a shard.
        autocast: makes the context of one forward pass.
        progress: called with (sequences done, sequences in all) after every batch and every shard found finished.

    Returns:
        Part name -> the names of its shards.

    Raises:
        StageError: if the teacher's logits aren't finite.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    total, done = sum(len(tokens) for tokens in parts.values()), 0
    names = {part: shard_names(part, len(parts[part]), shard_sequences) for part in PARTS}
    model.eval()
    for part in PARTS:
        for number, name in enumerate(names[part]):
            tokens = parts[part][number * shard_sequences : (number + 1) * shard_sequences]
            if _is_finished(folder / name, log):
                done += len(tokens)
                progress(done, total)
                continue
            generator = torch.Generator().manual_seed(_shard_seed(seed, name))
            answers = []
            for first in range(0, len(tokens), batch):
                ids = torch.from_numpy(tokens[first : first + batch].astype(np.int64)).to(device)
                answers.append(ask_teacher(model, ids, top_k, random_negatives, generator, autocast))
                done += len(ids)
                progress(done, total)
            _save_shard(folder / name, {key: np.concatenate([item[key] for item in answers]) for key in answers[0]})
    return names


def ask_teacher(
    model: torch.nn.Module,
    tokens: Tensor,
    top_k: int,
    random_negatives: int,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, np.ndarray]:
    """One forward pass over tokens [B, L], as the arrays of a shard (see `a1q.distill.cache`).

    Raises:
        StageError: if a logit isn't finite.
    """
    import torch

    with torch.inference_mode(), autocast():
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    vocabulary = logits.shape[-1]
    with torch.inference_mode():
        lse = torch.logsumexp(logits, dim=-1)
        if not torch.isfinite(lse).all():
            raise StageError(
                "the teacher's logits are not finite; is its checkpoint intact, is `runtime.amp` too coarse?"
            )
        top, ids = largest(logits, top_k)
        offsets = draw_offsets((*tokens.shape, random_negatives), vocabulary - top_k, generator)
        negatives = offsets_to_ids(offsets.to(tokens.device), ids, vocabulary)
        base = lse.unsqueeze(-1)
        lowest = torch.finfo(torch.float16).min  # a forbidden token's -inf would give NaN in a loss
        id_type = UNSIGNED[id_bytes(vocabulary)]
        offset_type = UNSIGNED[offset_bytes(vocabulary - top_k, random_negatives)]
        return {
            "tokens": tokens.cpu().numpy().astype(id_type),
            "ids": ids.cpu().numpy().astype(id_type),
            "logits": (top - base).clamp_min(lowest).half().cpu().numpy(),
            "negatives": offsets.numpy().astype(offset_type),
            "negative_logits": (logits.gather(-1, negatives) - base).clamp_min(lowest).half().cpu().numpy(),
            "lse": lse.cpu().numpy(),
        }


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last dimension and their indices (int64), descending, as `torch.topk` has them.

    On the CPU, unless `count` is a small part of the whole, topk copies all values into pairs to select among them;
    NumPy's partition takes less than half the time.
    """
    import torch

    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu" or count * FEW <= vocabulary:
        top, ids = torch.topk(logits, count, dim=-1)
        return top, ids
    first = vocabulary - count
    ids = torch.from_numpy(np.argpartition(logits.numpy(), first, axis=-1)[..., first:])
    top, order = logits.gather(-1, ids).sort(dim=-1, descending=True)
    return top, ids.gather(-1, order)


def publish_shards(folder: Path, names: dict[str, list[str]], out: Path) -> None:
    """Place the finished shards in `out` too; those in `folder` stay, in case this process is killed before it ends."""
    for name in (name for part in PARTS for name in names[part]):
        try:
            os.link(folder / name, out / name)
        except OSError:
            copy_file(folder / name, out / name)


def _save_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    aside = path.with_suffix(".tmp")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside)
    fsync_path(aside)
    digest = sha256_file(aside)
    os.replace(aside, path)
    write_atomic(_note(path), digest)


def _is_finished(path: Path, log: Callable[[str], None]) -> bool:
    if not path.exists():
        return False
    note = _note(path)
    if note.exists() and note.read_text(encoding="utf-8") == sha256_file(path):
        return True
    log(f"shard {path.name} of an earlier attempt is incomplete or damaged; computing it anew")
    return False


def _note(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _shard_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
