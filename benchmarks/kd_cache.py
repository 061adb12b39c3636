"""What a teacher cache costs: `python -m benchmarks.kd_cache [SEQUENCES [LAYERS [THREADS]]]`.

On a model of Qwen3-0.6B's shape with random weights: seconds of the teacher's forward pass alone and of the same with
the cache written, in turns, batch by batch, the least of each; the latter over the forward pass that is inside it, the
median of all, which other load on the machine hardly moves; bytes per kept logit; seconds of loading a batch. Then the
same on the built-in model's shape, with the losses.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from a1q.distill.cache import FORMAT, TeacherCache, position_bytes, sequence_bytes, write_description
from a1q.distill.losses import TAILS, kd_loss
from a1q.distill.teacher import write_shards
from a1q.engine.stage import Runtime
from a1q.training.device import prepare_torch
from benchmarks.common import print_table, save

VOCABULARY, LENGTH, TOP_K, NEGATIVES, BATCH, SHARD = 2048, 128, 64, 128, 8, 128
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN3_TOP_K, QWEN3_BATCH = 128, 4


def build_model() -> Any:
    """Qwen3 of the built-in model's shape."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config).eval()


def seconds_of(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def forward(model: Any, tokens: np.ndarray) -> None:
    """Run the model over all sequences and drop the logits."""
    with torch.inference_mode():
        for first in range(0, len(tokens), BATCH):
            model(input_ids=torch.from_numpy(tokens[first : first + BATCH]).long(), use_cache=False)


def write(model: Any, tokens: np.ndarray, folder: Path, batch: int = BATCH, top_k: int = TOP_K) -> None:
    """Write a cache as the `kd` stage does."""
    parts = {"train": tokens, "tune": tokens[:0]}
    names = write_shards(
        model,
        parts,
        folder=folder,
        top_k=top_k,
        random_negatives=NEGATIVES,
        shard_sequences=SHARD,
        batch=batch,
        seed=0,
    )
    meta = {
        "format": FORMAT,
        "vocabulary": model.config.vocab_size,
        "seq_len": LENGTH,
        "shard_sequences": SHARD,
        "parts": {part: {"sequences": len(parts[part]), "shards": names[part]} for part in parts},
    }
    write_description(folder, meta)


def qwen3_rows(count: int, layers: int) -> list[dict[str, Any]]:
    """Forward pass, building and loading at Qwen3-0.6B's shape."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, **QWEN3)).eval()
    vocabulary = QWEN3["vocab_size"]
    tokens = np.random.default_rng(0).integers(vocabulary, size=(count, LENGTH)).astype(np.int32)
    forward(model, tokens[:QWEN3_BATCH])  # warms up
    alone, built, within = [], [], []  # seconds of every batch
    model.register_forward_pre_hook(lambda *_: within.append(-time.perf_counter()))
    model.register_forward_hook(lambda *_: within.append(within.pop() + time.perf_counter()))
    with tempfile.TemporaryDirectory() as name:
        for first in range(0, count, QWEN3_BATCH):
            some, folder = tokens[first : first + QWEN3_BATCH], Path(name) / str(first)
            alone.append(seconds_of(lambda some=some: forward(model, some)))
            built.append(
                seconds_of(lambda some=some, folder=folder: write(model, some, folder, QWEN3_BATCH, QWEN3_TOP_K))
            )
        cache = TeacherCache(Path(name) / "0")
        draw = np.random.default_rng(1)
        loaded = {}
        for rows in (4, 16):
            picks = [draw.integers(cache.size(), size=rows) for _ in range(21)]
            loaded[rows] = statistics.median(seconds_of(lambda pick=pick: cache.batch(pick)) for pick in picks)
    same = statistics.median(whole / part for whole, part in zip(built, within[1::2], strict=True))
    sizes = [sequence_bytes(vocabulary, LENGTH, QWEN3_TOP_K, negatives) / LENGTH for negatives in (0, NEGATIVES)]
    figures = {
        f"teacher's forward pass, {QWEN3_BATCH} x {LENGTH}, s": min(alone),
        "the same and its cache written, s": min(built),
        "ratio": min(built) / min(alone),
        "a written batch over the forward pass inside it": same,
        "bytes per kept logit, without negatives": sizes[0] / QWEN3_TOP_K,
        "bytes per kept logit, with negatives": sizes[1] / (QWEN3_TOP_K + NEGATIVES),
    }
    for rows, seconds in loaded.items():
        figures[f"loading {rows} x {LENGTH}, s"] = seconds
        figures[f"the same over a forward pass of {rows} x {LENGTH}"] = seconds * QWEN3_BATCH / (rows * min(alone))
    return [{"what": what, "value": round(value, 4)} for what, value in figures.items()]


def pico_rows(count: int) -> list[dict[str, Any]]:
    """Forward pass, building, loading and losses at the built-in model's shape."""
    model = build_model()
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(count, LENGTH)).astype(np.int32)
    forward(model, tokens[:BATCH])
    rows: list[dict[str, Any]] = []

    def note(what: str, seconds: float, passed: int) -> None:
        rows.append({"what": what, "seconds": round(seconds, 3), "tokens_per_s": round(passed / seconds)})

    note("forward pass alone", min(seconds_of(lambda: forward(model, tokens)) for _ in range(2)), tokens.size)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(2)]
        note("written cache", min(seconds_of(lambda f=f: write(model, tokens, f)) for f in folders), tokens.size)
        cache = TeacherCache(folders[0])
        order = np.random.default_rng(1).permutation(count)
        batches = [order[first : first + 16] for first in range(0, count, 16)]
        note("reading, 16 a batch", seconds_of(lambda: [cache.batch(batch) for batch in batches]), tokens.size)
        batch = cache.batch(order[:16])
        logits = torch.randn(*batch.tokens.shape, VOCABULARY, requires_grad=True)
        for tail in TAILS:

            def step(tail: str = tail) -> None:
                kd_loss(logits, batch, tail=tail, hard_top1=0.1)[0].backward()
                logits.grad = None

            note(f"loss and gradient, {tail}", min(seconds_of(step) for _ in range(5)), batch.tokens.numel())
    return rows


def main(count: int = 32, layers: int = 28, threads: int = 2) -> None:
    """Measure and print."""
    prepare_torch(Runtime(threads=threads), 0)
    tables = {
        f"Teacher cache at Qwen3-0.6B's shape, {layers} layers, {count} x {LENGTH} tokens, top {QWEN3_TOP_K} and "
        f"{NEGATIVES} negatives, {threads} threads": qwen3_rows(count, layers),
        f"Teacher cache at the built-in model's shape, 256 x {LENGTH} tokens, "
        f"{position_bytes(VOCABULARY, TOP_K, NEGATIVES)} bytes per token, {threads} threads": pico_rows(256),
    }
    save("kd_cache", {"threads": threads, "layers": layers, "sequences": count, "tables": tables})
    for title, rows in tables.items():
        print_table(title, list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
