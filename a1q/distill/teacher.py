"""Ask a teacher about token sequences and write its answers as cache shards.

Shards are written one by one into a scratch folder, each durably and with its digest, and moved to the artifact at the
end. What a shard holds depends on the seed and its own number only, so a run that was killed computes the missing
ones and ends with the same bytes as one that never was, and several processes with one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from a1q.distill.cache import PARTS, note_of, token_bytes
from a1q.distill.largest import largest
from a1q.distill.negatives import draw_offsets, offset_bytes, offsets_to_ids
from a1q.distill.packed_ids import pack_ids
from a1q.engine.artifact import sha256_file
from a1q.engine.files import copy_file, fsync_path, write_atomic
from a1q.errors import StageError
from a1q.models.positions import passed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 1 << 21
"""Logits looked at together on the CPU, whose caches hold them from the sum to the choice of the largest."""
WIDE_PIECE = 1 << 27
"""The same elsewhere."""
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.int32}
"""Type of a stored id or offset, by its bytes."""


def shard_names(part: str, sequences: int, shard_sequences: int) -> list[str]:
    """File names of a part's shards, in order."""
    return [f"{part}-{number:05d}.safetensors" for number in range(-(-sequences // shard_sequences))]


def write_shards(
    model: torch.nn.Module,
    parts: Mapping[str, np.ndarray],
    *,
    starts: Mapping[str, np.ndarray] | None = None,
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
    process: int = 0,
    processes: int = 1,
    temperatures: Sequence[float] = (),
    said: Mapping[str, np.ndarray] | None = None,
    separate: bool = False,
) -> dict[str, list[str]]:
    """Write every shard that `folder` doesn't hold undamaged yet, or this process's share of them.

    With several processes at one folder, each writes shards of its own alone. When all have returned, or died, one
    call with the defaults checks everything and writes what is missing.

    Args:
        model: a causal language model; `model(**passed(tokens, borders)).logits` is [B, L, V].
        parts: part name (`train`, `tune`) -> tokens, integers [n, L].
        starts: part name -> bool [n, L], where documents begin; None: every sequence is a document of its own.
        said: part name -> bool [n, L], what an assistant said; None: the shards don't say.
        separate: ask about every document by itself: attention doesn't look beyond its start.
        folder: where shards of an earlier attempt with the same arguments may lie.
        batch: sequences per forward pass; a batch never crosses a shard.
        autocast: makes the context of one forward pass.
        progress: called with (sequences done, sequences in all), of this process's share, after every batch and every
            shard found finished.
        process: number of this process, below `processes`.
        temperatures: those whose partitions are kept beside that at 1.
        processes: how many share the work; of both parts' shards in order, process r takes number r, r + processes, ...

    Returns:
        Part name -> the names of its shards, whichever process writes them.

    Raises:
        StageError: if the teacher's logits aren't finite.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    names = {part: shard_names(part, len(parts[part]), shard_sequences) for part in PARTS}
    every = [(part, number) for part in PARTS for number in range(len(names[part]))]
    share = every[process::processes]
    rows = {place: slice(place[1] * shard_sequences, (place[1] + 1) * shard_sequences) for place in share}
    total, done = sum(len(parts[place[0]][rows[place]]) for place in share), 0
    model.eval()
    for part, number in share:
        name, tokens = names[part][number], parts[part][rows[part, number]]
        if _is_finished(folder / name, log):
            done += len(tokens)
            progress(done, total)
            continue
        generator = torch.Generator().manual_seed(_shard_seed(seed, name))
        begins = starts[part][rows[part, number]] if starts is not None else np.arange(tokens.shape[1]) == 0
        begins = np.broadcast_to(begins, tokens.shape)
        answers = []
        for first in range(0, len(tokens), batch):
            some = slice(first, first + batch)
            ids = torch.from_numpy(tokens[some].astype(np.int64)).to(device)
            borders = torch.from_numpy(begins[some].copy()) if separate else None
            answers.append(ask_teacher(model, ids, top_k, random_negatives, generator, autocast, temperatures, borders))
            done += len(ids)
            progress(done, total)
        arrays = {key: np.concatenate([item[key] for item in answers]) for key in answers[0]}
        arrays["starts"] = _packed(begins)
        if said is not None:
            arrays["said"] = _packed(said[part][rows[part, number]])
        _save_shard(folder / name, arrays)
    return names


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=-1, bitorder="little")


def ask_teacher(
    model: torch.nn.Module,
    tokens: Tensor,
    top_k: int,
    random_negatives: int,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    temperatures: Sequence[float] = (),
    borders: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """One forward pass over tokens [B, L], as the arrays of a shard (see `a1q.distill.cache`), less `starts` and
    `said`; `borders` bool [B, L] as `a1q.models.positions.passed` takes them.

    Raises:
        StageError: if a logit isn't finite.
    """
    import torch

    with torch.inference_mode(), autocast():
        logits = model(**passed(tokens, borders)).logits.flatten(0, 1)
    vocabulary = logits.shape[-1]
    offsets = draw_offsets((*tokens.shape, random_negatives), vocabulary - top_k, generator)
    at_once = max((PIECE if logits.device.type == "cpu" else WIDE_PIECE) // vocabulary, 1)
    places = offsets.flatten(0, 1).to(tokens.device).split(at_once)
    with torch.inference_mode():
        pieces = [
            _answers(piece.float(), place, top_k, temperatures)
            for piece, place in zip(logits.split(at_once), places, strict=True)
        ]
    answers = (torch.cat(items).unflatten(0, tokens.shape).cpu().numpy() for items in zip(*pieces, strict=True))
    lse, ids, top, negatives, partitions = answers
    offset_type = UNSIGNED[offset_bytes(vocabulary - top_k, random_negatives)]
    lower, upper = pack_ids(ids, vocabulary)
    return {
        "tokens": tokens.cpu().numpy().astype(UNSIGNED[token_bytes(vocabulary)]),
        "ids": lower,
        "ids_upper": upper,
        "logits": top,
        "negatives": offsets.numpy().astype(offset_type),
        "negative_logits": negatives,
        "lse": lse,
        **({"partitions": partitions} if temperatures else {}),
    }


def _answers(
    logits: Tensor, offsets: Tensor, top_k: int, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of positions' logits [N, V] and offsets [N, R]: logsumexp [N], the top-k's ids [N, K] and log-probabilities
    [N, K] in fp16, the log-probabilities [N, R] of the negatives, and the partitions [N, P] at `temperatures`.

    Raises:
        StageError: if a logit isn't finite.
    """
    import torch

    lse = torch.logsumexp(logits, dim=-1)
    if not torch.isfinite(lse).all():
        raise StageError("the teacher's logits are not finite; is its checkpoint intact, is `runtime.amp` too coarse?")
    top, ids = largest(logits, top_k)
    negatives = logits.gather(-1, offsets_to_ids(offsets, ids, logits.shape[-1]))
    lowest = torch.finfo(torch.float16).min  # a forbidden token's -inf would give NaN in a loss
    top, negatives = ((item - lse.unsqueeze(-1)).clamp_min(lowest).half() for item in (top, negatives))
    partitions = logits.new_empty(len(logits), len(temperatures))
    for column, temperature in zip(partitions.unbind(-1), temperatures, strict=True):
        column.copy_(torch.logsumexp(logits / temperature, dim=-1))
    return lse, ids, top, negatives, partitions


def publish_shards(folder: Path, names: dict[str, list[str]], out: Path) -> None:
    """Place the finished shards in `out` too; those in `folder` stay, in case this process is killed before it ends."""
    for name in (name for part in PARTS for name in names[part]):
        try:
            os.link(folder / name, out / name)
        except OSError:
            copy_file(folder / name, out / name)


def _save_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)  # by an earlier attempt: nobody else writes this shard
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside)
        fsync_path(aside)
        digest = sha256_file(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    write_atomic(note_of(path), digest)


def _is_finished(path: Path, log: Callable[[str], None]) -> bool:
    if not path.exists():
        return False
    note = note_of(path)
    if note.exists() and note.read_text(encoding="utf-8") == sha256_file(path):
        return True
    log(f"shard {path.name} of an earlier attempt is incomplete or damaged; computing it anew")
    return False


def _shard_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
