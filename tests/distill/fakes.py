"""A stand-in for a language model: logits are a fixed function of the tokens, cheap and the same everywhere.

`python -m tests.distill.fakes FOLDER PROCESS PROCESSES [die]` writes one process's share of a cache, or is killed while
it writes its first shard.
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from a1q.distill.cache import FORMAT, PARTS
from a1q.distill.teacher import write_shards


class TableModel(torch.nn.Module):
    """`logits[b, t] = table[tokens[b, t]]`; counts its calls."""

    def __init__(self, vocabulary, seed=0):
        super().__init__()
        self.table = 3 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
        self.calls = 0

    def forward(self, input_ids, use_cache=False):
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


class RowModel(torch.nn.Module):
    """The same for wide vocabularies: one row of distinct logits, shifted by the token."""

    def __init__(self, vocabulary, seed=0):
        super().__init__()
        self.table = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed)) / vocabulary * 20

    def forward(self, input_ids, use_cache=False):
        rows = [self.table.roll(token) for token in input_ids.flatten().tolist()]
        return SimpleNamespace(logits=torch.stack(rows).unflatten(0, input_ids.shape))


class Killed(BaseException):
    """What a test raises where a process would die."""


def random_tokens(sequences, length, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (sequences, length), generator=generator).int().numpy()


def write(folder, model, parts, *, top_k=5, random_negatives=7, shard_sequences=4, batch=2, seed=11, **more):
    """`write_shards` plus the description, as the stage leaves them."""
    import json

    names = write_shards(
        model,
        parts,
        folder=folder,
        top_k=top_k,
        random_negatives=random_negatives,
        shard_sequences=shard_sequences,
        batch=batch,
        seed=seed,
        **more,
    )
    description = {
        "format": FORMAT,
        "vocabulary": len(model.table),
        "seq_len": parts["train"].shape[1],
        "top_k": top_k,
        "random_negatives": random_negatives,
        "shard_sequences": shard_sequences,
        "temperatures": list(more.get("temperatures", ())),
        "said": {part: int(bits.sum()) for part, bits in more["said"].items()} if "said" in more else None,
        "parts": {part: {"sequences": len(parts[part]), "shards": names[part]} for part in PARTS},
    }
    (folder / "teacher.json").write_text(json.dumps(description))
    return names


def main(folder, process, processes, die=""):
    """The cache of the tests of the writer."""
    if die:
        import a1q.distill.teacher

        a1q.distill.teacher.fsync_path = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    parts = {"train": random_tokens(10, 6, 40), "tune": random_tokens(3, 6, 40, seed=1)}
    write(Path(folder), TableModel(40), parts, process=int(process), processes=int(processes))


if __name__ == "__main__":
    main(*sys.argv[1:])
