"""Head and loss tile by tile against all logits at once: `python -m benchmarks.training.head [ROUNDS]`.

A head of Qwen3-0.6B's shape over 512 positions, forward and backward, the distillation loss with a teacher's top 128
and 128 random negatives. Every variant runs in a process of its own; memory is the process's peak above what it was
once everything was imported; the head itself is in it, and taken out in the second ratio. Heads: fp32 that stands still
(an embedding kept in full precision), the same one trained, 4-bit `lut_lowrank` that stands still, and the same one
with scales and table trained.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import print_table, save

VOCABULARY, HIDDEN, SEQUENCES, LENGTH, TOP_K, NEGATIVES = 151936, 1024, 4, 128, 128, 128
HEADS = ("fp32, still", "fp32, trained", "4 bit, still", "4 bit, trained")
WAYS = ("all logits", "tiles")


def peak_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(head: str, way: str, rounds: int) -> dict[str, Any]:
    """Peak bytes above the imports', and the least seconds of a forward and backward pass."""
    import torch

    from a1q.distill.cache import TeacherBatch
    from a1q.distill.head import Head
    from a1q.distill.losses import Terms, asked_of, kd_loss, loss_of
    from a1q.quant.linear import QuantLinear

    torch.manual_seed(0)
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = peak_bytes()
    if head.startswith("4 bit"):
        indices = torch.randint(16, (VOCABULARY, HIDDEN), dtype=torch.uint8)
        scale = {"a": torch.full((VOCABULARY, 1), 0.1), "g": torch.ones(1), "b": torch.full((1, HIDDEN), 0.1)}
        parts = {"indices": indices, "lut": torch.linspace(-2, 2, 16), **scale, "gain": torch.ones(VOCABULARY)}
        module = QuantLinear({"scheme": "lut_lowrank", "bits": 4}, parts)
    else:
        module = torch.nn.utils.skip_init(torch.nn.Linear, HIDDEN, VOCABULARY, bias=False)
        torch.nn.init.normal_(module.weight, std=0.02)
    if head.endswith("still"):
        module.requires_grad_(False)
    places = SEQUENCES, LENGTH
    ids = torch.randint(VOCABULARY, (*places, TOP_K + NEGATIVES))
    values = torch.randn(*places, TOP_K + NEGATIVES) - 12
    tokens, lse = torch.randint(VOCABULARY, places), torch.zeros(places)
    batch = TeacherBatch(
        tokens,
        ids[..., :TOP_K],
        values[..., :TOP_K],
        ids[..., TOP_K:],
        values[..., TOP_K:],
        lse,
        VOCABULARY,
        starts=tokens < 0,
    )
    states = torch.randn(*places, HIDDEN).requires_grad_()
    trained = [part for part in module.parameters() if part.requires_grad]
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        if way == "tiles":
            terms = Terms()
            answers = Head(module).partitions_and_picked(states, asked_of(batch, terms), terms.temperatures)
            loss = loss_of(*answers, batch, terms)[0]
        else:
            loss = kd_loss(module(states), batch)[0]
        gradients = torch.autograd.grad(loss, [states, *trained], allow_unused=True)
        seconds.append(time.perf_counter() - began)
        pull = float(gradients[0].norm())
        del gradients
    own = sum(item.nbytes for item in [*module.parameters(), *module.buffers()])
    found = {"bytes": peak_bytes() - before, "head_bytes": own, "seconds": min(seconds)}
    return {**found, "loss": loss.item(), "gradient": pull}


def main(rounds: int) -> None:
    """Measure all variants in turn and print the ratios."""
    found = []
    for head in HEADS:
        pair = {}
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.training.head", "--one", head, way, str(rounds)]
            pair[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found.append({"head": head, **pair})
    save("training_head", found)
    lines = []
    for row in found:
        whole, tiles = (row[way] for way in WAYS)
        lines.append(
            [
                row["head"],
                f"{whole['bytes'] / 2**20:,.0f}",
                f"{tiles['bytes'] / 2**20:,.0f}",
                f"{tiles['bytes'] / whole['bytes']:.3f}",
                f"{(tiles['bytes'] - tiles['head_bytes']) / (whole['bytes'] - whole['head_bytes']):.3f}",
                f"{whole['seconds']:.2f}",
                f"{tiles['seconds']:.2f}",
                f"{tiles['seconds'] / whole['seconds']:.3f}",
                f"{abs(tiles['gradient'] / whole['gradient'] - 1):.1e}",
            ]
        )
    header = [
        "head",
        "all logits, MiB",
        "tiles, MiB",
        "ratio",
        "without the head",
        "all logits, s",
        "tiles, s",
        "ratio",
        "gradients differ by",
    ]
    print_table(f"Head and loss, vocabulary {VOCABULARY:,}, {SEQUENCES * LENGTH} positions", header, lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
