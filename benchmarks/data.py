"""How fast text becomes sequences, beside the tokenizer alone, and in how much memory. `python -m benchmarks.data`.

Speed: documents of a JSONL file until they are sequences (order, templates, tokens, marks of what an assistant said,
packing) against the tokenizer alone (`encode_batch_fast` on the finished texts), both out of memory and on all cores,
in turns in one process; and all of `read_sequences`, which also opens tokenizer and template and reads the file. Each
is the least of `ROUNDS` short turns, as others may use the machine; CPU seconds depend less on them. The tokenizer is
of the Qwen kind, trained here: byte-level BPE with 32,000 tokens. Memory: peak resident size of a process that reads
2,048 sequences out of files of growing size, and what it held before.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, save

ROUNDS, MEGABYTES, LENGTH = 10, 12, 128
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
    """Least seconds, and CPU seconds of all threads, of the tokenizer alone, of documents until they are sequences, and
    of `read_sequences`; tokens."""
    from a1q.data import read_sequences
    from a1q.data.reading import Reader, Told
    from a1q.data.sequences import _cut, _taken, load_tokenizer

    entry = {"source": str(path), "holdout": 1e-9, **options}
    encode, end = load_tokenizer(folder)
    turns = ("alone", "packing", "all")
    best = dict.fromkeys((*turns, *(f"{name} cpu" for name in turns)), float("inf"))
    tokens = 0

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start, spent = time.perf_counter(), time.process_time()
        found = work()
        best[name] = min(best[name], time.perf_counter() - start)
        best[f"{name} cpu"] = min(best[f"{name} cpu"], time.process_time() - spent)
        return found

    told = Told()
    with Reader(entry, folder, encode, end, "train", "0/train", True, told) as reader:
        texts = [piece for number in reader._order for piece in reader._pieces(reader._spool[number])]
        for _ in range(ROUNDS):
            timed("alone", lambda: [_encoded(encode, texts[at : at + 1024]) for at in range(0, len(texts), 1024)])
            timed("packing", lambda: _cut(entry, _taken([reader], [1.0], None)[0], "train", LENGTH, None, told, 0))
            found = timed("all", lambda: read_sequences(entry, folder, "train", LENGTH, None, 0, marks=True))
            tokens = found.tokens.size
    return {**best, "tokens": tokens}


def _encoded(encode: Any, texts: list[str]) -> None:
    encode.encode_batch_fast(texts, add_special_tokens=False)


def peak(folder: str, small: str, path: str, into: Any) -> None:
    """Put the memory (MiB) held before, the peak while 2,048 sequences are read, and the seconds, into a queue.

    Linux only. The system's own count for a process begins with that of the process which started it, so the kernel's
    count for this address space is read, after it was set back.
    """
    from a1q.data import read_sequences

    read_sequences({"source": small}, Path(folder), "train", LENGTH, 8, 0, marks=True)  # imports
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    start = time.perf_counter()
    read_sequences({"source": path}, Path(folder), "train", LENGTH, 2048, 0, marks=True)
    into.put((_status("VmHWM"), before, time.perf_counter() - start))


def _status(name: str) -> float:
    """A count of memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


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
        small = Path(scratch) / "small.jsonl"
        write(small, texts, 1, True)
        for megabytes in sizes:
            path = Path(scratch) / "large.jsonl"
            write(path, texts, megabytes, True)
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=peak, args=(str(folder), str(small), str(path), queue))
            process.start()
            found, before, seconds = queue.get()
            process.join()
            memory.append({"megabytes": megabytes, "peak": found, "before": before, "seconds": seconds})
    print_table(
        f"Tokenizing and packing (least of {ROUNDS}; at least {LIMIT} wanted)",
        ["set", "tokens", "tokenizer alone, tokens/s", "a1q, tokens/s", "share", "of CPU seconds", "from the file on"],
        [
            [
                row["what"],
                f"{row['tokens']:,}",
                f"{row['tokens'] / row['alone']:,.0f}",
                f"{row['tokens'] / row['packing']:,.0f}",
                f"{row['alone'] / row['packing']:.2f}",
                f"{row['alone cpu'] / row['packing cpu']:.2f}",
                f"{row['alone'] / row['all']:.2f}",
            ]
            for row in rows
        ],
    )
    print_table(
        "Memory of reading 2,048 sequences of conversations",
        ["file, MB", "peak, MiB", "before, MiB", "more, MiB", "seconds"],
        [
            [
                str(row["megabytes"]),
                f"{row['peak']:,.0f}",
                f"{row['before']:,.0f}",
                f"{row['peak'] - row['before']:,.0f}",
                f"{row['seconds']:.0f}",
            ]
            for row in memory
        ],
    )
    save("data", {"rows": rows, "memory": memory, "limit": LIMIT})


if __name__ == "__main__":
    main()
