"""The teacher cache on disk: what a teacher said about fixed sequences, read by rows.

A cache is a folder of `PART-NNNNN.safetensors` shards (parts `train` and `tune`) and `teacher.json`. Per sequence of L
tokens a shard holds, with K the number of top logits and R that of random negatives:

| tensor            | shape      | type                                                                        |
|-------------------|------------|-----------------------------------------------------------------------------|
| `tokens`          | [n, L]     | uint16, or int32 for a vocabulary of 65536 or more                          |
| `ids`             | [n, L, K]  | the same; the teacher's top-k, best first                                   |
| `logits`          | [n, L, K]  | fp16, less the position's logsumexp: a log-probability, so precise near 0   |
| `negatives`       | [n, L, R]  | uint8, uint16 or int32, see `a1q.distill.negatives`                         |
| `negative_logits` | [n, L, R]  | fp16, less the logsumexp                                                    |
| `lse`             | [n, L]     | float32, logsumexp over the whole vocabulary                                |

Position t holds the distribution of token t + 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.distill.negatives import offset_bytes, offsets_to_ids
from a1q.errors import StageError
from a1q.models.view import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = "teacher.json"
FORMAT = 1
PARTS = ("train", "tune")
TYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "F16": np.float16, "F32": np.float32}
"""The safetensors types that occur in a shard."""


@dataclass(frozen=True)
class TeacherBatch:
    """What the teacher said about B sequences of L tokens."""

    tokens: Tensor
    """int64 [B, L]."""
    ids: Tensor
    """int64 [B, L, K], the teacher's top-k token ids, best first."""
    logits: Tensor
    """float32 [B, L, K], their logits."""
    negatives: Tensor
    """int64 [B, L, R], random ids outside the top-k; R may be 0."""
    negative_logits: Tensor | None
    """float32 [B, L, R]; None when R is 0."""
    lse: Tensor
    """float32 [B, L], logsumexp of the teacher's logits over the whole vocabulary."""
    vocabulary: int
    """Size of the teacher's vocabulary."""

    @property
    def top1(self) -> Tensor:
        """int64 [B, L], the teacher's most probable token."""
        return self.ids[..., 0]

    @property
    def negative_weight(self) -> float:
        """How many ids of the rest one random negative stands for: (vocabulary - K) / R; 0 when R is 0."""
        count = self.negatives.shape[-1]
        return (self.vocabulary - self.ids.shape[-1]) / count if count else 0.0


def id_bytes(vocabulary: int) -> int:
    """Bytes of one stored token id."""
    return 2 if vocabulary < 1 << 16 else 4


def position_bytes(vocabulary: int, top_k: int, random_negatives: int) -> int:
    """Bytes that one position (one token) takes in a shard: multiply by the tokens for the size of a cache."""
    top = top_k * (id_bytes(vocabulary) + 2)
    negatives = random_negatives * (offset_bytes(vocabulary - top_k, random_negatives) + 2)
    return id_bytes(vocabulary) + top + negatives + 4


class TeacherCache:
    """Reads a teacher cache lazily: shards are memory-mapped, and only the rows asked for are touched."""

    def __init__(self, folder: Path | str):
        """Open the cache in `folder`.

        Raises:
            StageError: if it is no teacher cache, or a shard is missing, truncated or of another shape.
        """
        self.folder = Path(folder)
        self.meta: Mapping[str, Any] = _read_description(self.folder)
        self.seq_len: int = self.meta["seq_len"]
        self.vocabulary: int = self.meta["vocabulary"]
        self._shards = {part: [self._open(name) for name in self.meta["parts"][part]["shards"]] for part in PARTS}
        for part in PARTS:
            found = sum(len(shard["tokens"]) for shard in self._shards[part])
            if found != self.size(part):
                raise StageError(
                    f"{self.folder}: {found} sequences in part {part!r}, {DESCRIPTION} says {self.size(part)}"
                )

    def size(self, part: str = "train") -> int:
        """Number of sequences in a part (`train` or `tune`)."""
        return self.meta["parts"][part]["sequences"]

    def batch(self, rows: Sequence[int] | np.ndarray, part: str = "train", device: Any = "cpu") -> TeacherBatch:
        """The given sequences of a part, in the order given.

        Raises:
            IndexError: if a row is not in [0, size(part)).
        """
        import torch

        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.size(part)):
            raise IndexError(f"part {part!r} has rows 0 ... {self.size(part) - 1}, not {rows.tolist()}")
        per_shard = max(self.meta["shard_sequences"], 1)
        found: dict[str, Tensor] = {}
        for name in ("tokens", "ids", "logits", "negatives", "negative_logits", "lse"):
            picked = np.stack([self._shards[part][row // per_shard][name][row % per_shard] for row in rows])
            wanted = np.float32 if picked.dtype.kind == "f" else np.int64
            found[name] = torch.from_numpy(picked.astype(wanted)).to(device)
        base = found["lse"].unsqueeze(-1)
        has_negatives = found["negatives"].shape[-1] > 0
        return TeacherBatch(
            tokens=found["tokens"],
            ids=found["ids"],
            logits=found["logits"] + base,
            negatives=offsets_to_ids(found["negatives"], found["ids"], self.vocabulary),
            negative_logits=found["negative_logits"] + base if has_negatives else None,
            lse=found["lse"],
            vocabulary=self.vocabulary,
        )

    def _open(self, name: str) -> dict[str, np.ndarray]:
        path = self.folder / name
        try:
            header = read_safetensors_header(path)
        except (OSError, ValueError) as error:
            raise StageError(f"teacher cache shard can't be read: {error}") from None
        start = 8 + int.from_bytes(path.open("rb").read(8), "little")
        data = np.memmap(path, np.uint8, "r", offset=start)
        arrays = {}
        for key, item in header.items():
            if key != "__metadata__":
                first, last = item["data_offsets"]
                arrays[key] = data[first:last].view(TYPES[item["dtype"]]).reshape(item["shape"])
        return arrays


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{folder} is no teacher cache: {error}") from None
    if meta.get("format") != FORMAT:
        raise StageError(f"{path}: format {meta.get('format')!r}; this version reads format {FORMAT}")
    return meta
