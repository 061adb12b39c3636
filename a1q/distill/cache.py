"""The teacher cache on disk: what a teacher said about fixed sequences, read by rows.

A cache is a folder of `PART-NNNNN.safetensors` shards (parts `train` and `tune`) and `teacher.json`. Per sequence of L
tokens a shard holds, with K the number of top logits and R that of random negatives:

| tensor            | shape      | type                                                                        |
|-------------------|------------|-----------------------------------------------------------------------------|
| `tokens`          | [n, L]     | uint16, or int32 for a vocabulary of more than 65536                        |
| `starts`          | [n, L / 8] | uint8, a bit per token: set where a document begins; the first stands lowest |
| `said`            | [n, L / 8] | uint8, a bit per token likewise: set where an assistant said it; of chats alone |
| `ids`             | [n, L, K]  | uint16, the lower 16 bits of the teacher's top-k ids, best first            |
| `ids_upper`       | [n, L, U]  | uint8, their bits above, if any, see `a1q.distill.packed_ids`               |
| `logits`          | [n, L, K]  | fp16, less the position's logsumexp: a log-probability, so precise near 0   |
| `negatives`       | [n, L, R]  | uint8, uint16 or int32, see `a1q.distill.negatives`                         |
| `negative_logits` | [n, L, R]  | fp16, less the logsumexp                                                    |
| `lse`             | [n, L]     | float32, logsumexp over the whole vocabulary                                |
| `partitions`      | [n, L, P]  | float32, logsumexp(logits / T) for every T of `temperatures`, if any        |

Position t holds the distribution of token t + 1.

The description is written before the first shard and says what will be there. Beside a shard in a folder that is still
being written lies a note of its digest, `PART-NNNNN.sha256`, from when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from a1q.distill.negatives import offset_bytes, offsets_to_ids
from a1q.distill.packed_ids import unpack_ids, upper_bits, upper_bytes
from a1q.engine.files import write_atomic
from a1q.errors import StageError
from a1q.models.view import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = "teacher.json"
FORMAT = 2
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
    starts: Tensor
    """bool [B, L], where a document begins; a sequence's first token may be in the middle of one."""
    partitions: Mapping[float, Tensor] = field(default_factory=dict)
    """Temperature T -> float32 [B, L], logsumexp(logits / T) over the whole vocabulary, where the cache has it."""
    target_share: float | None = None
    """Targets per position of what the mean over next tokens is taken over, where that is more than this batch
    (`TeacherCache.target_share`); None for this batch."""
    said: Tensor | None = None
    """bool [B, L], tokens that an assistant said; None where the cache doesn't know."""
    separate: bool = False
    """Whether the teacher was asked about every document by itself."""

    @property
    def borders(self) -> Tensor | None:
        """`starts` where attention is to stay within a document, else None; see `a1q.models.positions.passed`."""
        return self.starts if self.separate else None

    @property
    def targets(self) -> float | None:
        """How many next tokens their mean divides by; None for those that there are (`continues`)."""
        return None if self.target_share is None else self.target_share * self.tokens.numel()

    @property
    def continues(self) -> Tensor:
        """bool [B, L], whether the sequence goes on behind a position with the same document."""
        import torch

        last = torch.ones_like(self.starts[:, :1])
        return ~torch.cat([self.starts[:, 1:], last], dim=1)

    @property
    def says(self) -> Tensor:
        """bool [B, L], whether an assistant said the token behind a position; false for the last."""
        import torch

        assert self.said is not None
        return torch.cat([self.said[:, 1:], torch.zeros_like(self.said[:, :1])], dim=1)

    @property
    def top1(self) -> Tensor:
        """int64 [B, L], the teacher's most probable token."""
        return self.ids[..., 0]

    @property
    def negative_weight(self) -> float:
        """How many ids of the rest one random negative stands for: (vocabulary - K) / R; 0 when R is 0."""
        count = self.negatives.shape[-1]
        return (self.vocabulary - self.ids.shape[-1]) / count if count else 0.0


def token_bytes(vocabulary: int) -> int:
    """Bytes of one stored token of the text."""
    return 4 if upper_bits(vocabulary) else 2


def position_bytes(vocabulary: int, top_k: int, random_negatives: int, temperatures: int = 0) -> int:
    """Bytes that one position (one token) takes in a shard, but for the bits of `starts` and `said`; with partitions at
    so many temperatures."""
    top = top_k * (2 + 2) + upper_bytes(vocabulary, top_k)
    negatives = random_negatives * (offset_bytes(vocabulary - top_k, random_negatives) + 2)
    return token_bytes(vocabulary) + top + negatives + 4 * (1 + temperatures)


def sequence_bytes(
    vocabulary: int, length: int, top_k: int, random_negatives: int, temperatures: int = 0, chats: bool = False
) -> int:
    """Bytes that one sequence takes in a shard: multiply by the sequences for the size of a cache."""
    bits = -(-length // 8) * (2 if chats else 1)
    return length * position_bytes(vocabulary, top_k, random_negatives, temperatures) + bits


def note_of(shard: Path) -> Path:
    """Where the digest of a shard is noted once it is whole, in a folder that is being written."""
    return shard.with_suffix(".sha256")


def write_description(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write `teacher.json`, whole or not at all."""
    write_atomic(folder / DESCRIPTION, json.dumps(meta, indent=2, sort_keys=True))


class TeacherCache:
    """Reads a teacher cache lazily: shards are memory-mapped, and only the rows asked for are touched."""

    def __init__(self, folder: Path | str, partial: bool = False):
        """Open the cache in `folder`.

        Args:
            partial: `folder` is still being written, and rows of finished shards can be read already (`ready`).

        Raises:
            StageError: if it is no teacher cache, or a shard is missing, truncated or of another shape.
        """
        self.folder = Path(folder)
        self.partial = partial
        self.meta: Mapping[str, Any] = _read_description(self.folder)
        self.seq_len: int = self.meta["seq_len"]
        self.vocabulary: int = self.meta["vocabulary"]
        self.temperatures: Sequence[float] = tuple(self.meta.get("temperatures", ()))
        self.knows_who: bool = self.meta.get("said") is not None
        """Whether it says which tokens an assistant said."""
        self.separate: bool = bool(self.meta.get("separate"))
        """Whether the teacher was asked about every document by itself, as students then have to be."""
        self._per_shard = max(self.meta["shard_sequences"], 1)
        self._shards: dict[str, dict[int, dict[str, np.ndarray]]] = {part: {} for part in PARTS}
        self._finished = dict.fromkeys(PARTS, 0)
        for part in () if partial else PARTS:
            found = sum(len(self._shard(part, number)["tokens"]) for number in range(len(self._names(part))))
            if found != self.size(part):
                raise StageError(
                    f"{self.folder}: {found} sequences in part {part!r}, {DESCRIPTION} says {self.size(part)}"
                )

    def size(self, part: str = "train") -> int:
        """Number of sequences in a part (`train` or `tune`), those that are still to be written included."""
        return self.meta["parts"][part]["sequences"]

    def ready(self, part: str = "train") -> int:
        """Number of sequences that can be read from the start of a part without a gap, as of now."""
        if not self.partial:
            return self.size(part)
        names = self._names(part)
        while self._finished[part] < len(names) and note_of(self.folder / names[self._finished[part]]).exists():
            self._finished[part] += 1
        return min(self._finished[part] * self._per_shard, self.size(part))

    def batch(self, rows: Sequence[int] | np.ndarray, part: str = "train", device: Any = "cpu") -> TeacherBatch:
        """The given sequences of a part, in the order given.

        Raises:
            IndexError: if a row is not in [0, size(part)).
            StageError: if a row's shard is not written yet.
        """
        import torch

        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.size(part)):
            raise IndexError(f"part {part!r} has rows 0 ... {self.size(part) - 1}, not {rows.tolist()}")
        numbers, offsets = (array.tolist() for array in np.divmod(rows, self._per_shard))
        places = [(self._shard(part, number), offset) for number, offset in zip(numbers, offsets, strict=True)]

        def stacked(name: str) -> np.ndarray:
            return np.stack([shard[name][offset] for shard, offset in places])

        def tensor(array: np.ndarray, kind: type) -> Tensor:
            return torch.from_numpy(array.astype(kind, copy=False)).to(device)

        ids = tensor(unpack_ids(stacked("ids"), stacked("ids_upper"), self.vocabulary), np.int64)
        lse = tensor(stacked("lse"), np.float32)
        negatives = tensor(stacked("negatives"), np.int64)
        negative_logits = tensor(stacked("negative_logits"), np.float32) if negatives.shape[-1] else None
        starts = self._unpacked(stacked("starts"))
        said = tensor(self._unpacked(stacked("said")), np.bool_) if self.knows_who else None
        partitions = tensor(stacked("partitions"), np.float32).unbind(-1) if self.temperatures else ()
        return TeacherBatch(
            tokens=tensor(stacked("tokens"), np.int64),
            ids=ids,
            logits=tensor(stacked("logits"), np.float32).add_(lse.unsqueeze(-1)),
            negatives=offsets_to_ids(negatives, ids, self.vocabulary),
            negative_logits=None if negative_logits is None else negative_logits.add_(lse.unsqueeze(-1)),
            lse=lse,
            vocabulary=self.vocabulary,
            starts=tensor(starts, np.bool_),
            partitions=dict(zip(self.temperatures, partitions, strict=True)),
            said=said,
            separate=self.separate,
        )

    def target_share(self, rows: Sequence[int], part: str = "train", said: bool = False) -> float:
        """How many of the given sequences' positions have a next token in the same document, as a share of all; with
        `said` one that an assistant said.

        Micro-batches and processes that are weighed by their positions give with it the mean over all targets.
        """
        places = [divmod(row, self._per_shard) for row in rows]

        def bits(name: str) -> np.ndarray:
            return self._unpacked(np.stack([self._shard(part, number)[name][offset] for number, offset in places]))

        starts = bits("starts")
        if said:
            return int(((starts == 0) & (bits("said") == 1))[:, 1:].sum()) / starts.size
        return 1 - (starts[:, 1:].sum() + len(rows)) / starts.size

    def _unpacked(self, bits: np.ndarray) -> np.ndarray:
        """uint8 [n, L], 0 or 1, of [n, L / 8]."""
        return np.unpackbits(bits, axis=-1, count=self.seq_len, bitorder="little")

    def _names(self, part: str) -> Sequence[str]:
        return self.meta["parts"][part]["shards"]

    def _shard(self, part: str, number: int) -> dict[str, np.ndarray]:
        """Tensor name -> array of a shard, which is opened the first time.

        Raises:
            StageError: if it is not written yet, or damaged.
        """
        shard = self._shards[part].get(number)
        if shard is None:
            name = self._names(part)[number]
            if self.partial and not note_of(self.folder / name).exists():
                raise StageError(
                    f"{self.folder}: {name} is not written yet; of part {part!r} the first {self.ready(part)} of "
                    f"{self.size(part)} sequences can be read so far"
                )
            shard = self._shards[part][number] = self._open(name)
        return shard

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
        raise StageError(
            f"{path}: `format` is {meta.get('format')!r}, and this version reads {FORMAT}; "
            "make the cache anew: `a1q run` does it by itself"
        )
    return meta
