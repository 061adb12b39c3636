"""What a teacher cache costs: `python -m benchmarks.kd_cache [SEQUENCES]`.

Seconds of the teacher's forward pass alone, of the whole writer, of reading shuffled batches and of the losses, on a
model of the built-in one's shape with random weights, and the bytes per token.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from a1q.distill.cache import DESCRIPTION, FORMAT, TeacherCache, position_bytes
from a1q.distill.losses import TAILS, kd_loss
from a1q.distill.teacher import write_shards
from a1q.engine.artifact import canonical_json
from benchmarks.common import print_table, save

VOCABULARY, LENGTH, TOP_K, NEGATIVES, BATCH, SHARD = 2048, 128, 64, 128, 8, 128


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


def write(model: Any, tokens: np.ndarray, folder: Path) -> None:
    """Write a cache as the `kd` stage does."""
    parts = {"train": tokens, "tune": tokens[:0]}
    names = write_shards(
        model,
        parts,
        folder=folder,
        top_k=TOP_K,
        random_negatives=NEGATIVES,
        shard_sequences=SHARD,
        batch=BATCH,
        seed=0,
    )
    meta = {
        "format": FORMAT,
        "vocabulary": VOCABULARY,
        "seq_len": LENGTH,
        "shard_sequences": SHARD,
        "parts": {part: {"sequences": len(parts[part]), "shards": names[part]} for part in parts},
    }
    (folder / DESCRIPTION).write_bytes(canonical_json(meta))


def main() -> None:
    """Measure and print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 256
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
    title = f"Teacher cache, {count} x {LENGTH} tokens, {position_bytes(VOCABULARY, TOP_K, NEGATIVES)} bytes per token"
    save("kd_cache", rows)
    print_table(title, list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
