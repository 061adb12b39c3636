"""How fast text becomes sequences, beside the tokenizer alone, and in how much memory. `python -m benchmarks.data`.

Speed: `read_sequences` over all of a JSONL file (templates, marks of what an assistant said, order, packing; and, in a
column of its own, reading the file) against the tokenizer alone (`encode_batch_fast` on the finished texts, which lie
in memory), both on all cores, in turns in one process; least of `ROUNDS`. The tokenizer is one of the Qwen kind,
trained here: byte-level BPE with 32,000 tokens. Memory: peak resident size of a process that reads 2,048 sequences out
of files of growing size.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, save

ROUNDS, MEGABYTES, LENGTH = 3, 40, 128
SIZES = (50, 200, 1000)
"""Megabytes of the files whose reading is weighed."""
LIMIT = 0.8
"""Of the tokenizer's own speed."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""What Qwen 3 writes of conversations without tools."""


def documents() -> list[str]:
    """The built-in text."""
    from a1q.data import documents

    return list(documents({"source": "builtin:prose-all"}, "train"))


def write(path: Path, texts: list[str], megabytes: int, chats: bool) -> None:
    """A JSONL file of documents joined at random from `texts`, as text or as conversations of one to three turns."""
    draw, size = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as handle:
        while size < megabytes * 1_000_000:
            if chats:
                messages = []
                for _ in range(draw.choice((1, 1, 2, 3))):
                    messages.append({"role": "user", "content": draw.choice(texts)[:200]})
                    messages.append({"role": "assistant", "content": draw.choice(texts)[:800]})
                row: dict[str, Any] = {"messages": messages}
            else:
                row = {"text": "\n\n".join(draw.choices(texts, k=2))}
            size += handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def tokenizer(folder: Path, texts: list[str]) -> None:
    """A tokenizer with a chat template."""
    from a1q.data.bpe import train_tokenizer

    train_tokenizer(iter(texts), 32_000, 4096, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))


def speeds(folder: Path, path: Path, **options: Any) -> dict[str, float]:
    """Seconds of the tokenizer alone, of reading the file, and of all of `read_sequences`; tokens."""
    from a1q.data import read_sequences
    from a1q.data.chat import Chat
    from a1q.data.records import records
    from a1q.data.sequences import load_tokenizer

    entry = {"source": str(path), "holdout": 1e-9, **options}
    encode = load_tokenizer(folder)[0]
    chat = Chat(folder, encode, False if options.get("thinking") == "off" else None)
    texts = [
        piece
        for record in records(entry)
        for piece in (chat.pieces(record.messages) if record.messages else [record.text])
    ]
    best = dict.fromkeys(("alone", "reading", "all"), float("inf"))
    tokens = 0

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        best[name] = min(best[name], time.perf_counter() - start)
        return found

    for _ in range(ROUNDS):
        timed("alone", lambda: [_encoded(encode, texts[at : at + 1024]) for at in range(0, len(texts), 1024)])
        timed("reading", lambda: sum(1 for _ in records(entry)))
        found = timed("all", lambda: read_sequences(entry, folder, "train", LENGTH, None, 0, marks=True))
        tokens = found.tokens.size
    return {**best, "tokens": tokens}


def _encoded(encode: Any, texts: list[str]) -> None:
    encode.encode_batch_fast(texts, add_special_tokens=False)


def peak(folder: str, path: str, into: Any) -> None:
    """Put the peak memory (MiB) of reading 2,048 sequences, and that of the process before, into a queue."""
    from a1q.data import read_sequences

    read_sequences({"source": "builtin:qa"}, Path(folder), "train", LENGTH, 8, 0, marks=True)  # imports and caches
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    read_sequences({"source": path}, Path(folder), "train", LENGTH, 2048, 0, marks=True)
    into.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, before, time.perf_counter() - start))


def main() -> None:
    """Measure and print."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    sizes = [int(item) for item in sys.argv[1:]] or SIZES
    texts = documents()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        tokenizer(folder, texts)
        for name, chats, options in (
            ("text", False, {}),
            ("conversations", True, {}),
            ("conversations, thinking off", True, {"thinking": "off"}),
        ):
            path = Path(scratch) / f"{name}.jsonl"
            write(path, texts, MEGABYTES, chats)
            rows.append({"what": name, **speeds(folder, path, **options)})
        memory = []
        for megabytes in sizes:
            path = Path(scratch) / "large.jsonl"
            write(path, texts, megabytes, True)
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=peak, args=(str(folder), str(path), queue))
            process.start()
            found, before, seconds = queue.get()
            process.join()
            memory.append({"megabytes": megabytes, "peak": found, "before": before, "seconds": seconds})
    print_table(
        f"Tokenizing and packing (least of {ROUNDS}; at least {LIMIT} wanted)",
        ["set", "tokens", "tokenizer alone, tokens/s", "a1q, tokens/s", "share", "share with reading the file"],
        [
            [
                row["what"],
                f"{row['tokens']:,}",
                f"{row['tokens'] / row['alone']:,.0f}",
                f"{row['tokens'] / (row['all'] - row['reading']):,.0f}",
                f"{row['alone'] / (row['all'] - row['reading']):.2f}",
                f"{row['alone'] / row['all']:.2f}",
            ]
            for row in rows
        ],
    )
    print_table(
        "Memory of reading 2,048 sequences of conversations",
        ["file, MB", "peak, MiB", "before, MiB", "seconds"],
        [
            [str(row["megabytes"]), f"{row['peak']:,.0f}", f"{row['before']:,.0f}", f"{row['seconds']:.0f}"]
            for row in memory
        ],
    )
    save("data", {"rows": rows, "memory": memory, "limit": LIMIT})


if __name__ == "__main__":
    main()
