"""Size and correctness of the Core ML package of a model: `python -m benchmarks.coreml [SOURCE]`.

SOURCE is a built-in model, a folder (an a1q artifact, so its own indices and tables are exported) or a Hub id;
`builtin:pico` by default. The package is written, read back, interpreted and compared as in the `coreml` exporter's
own verification, whose minimum figures are switched off here: this prints what there is.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from a1q.coreml.layouts import LAYOUTS
from a1q.coreml.thresholds import Verify
from a1q.engine.stage import StageContext
from a1q.exporters.coreml import CoremlConfig, CoremlExporter
from a1q.models.source import resolve_source
from benchmarks.common import print_table, save

ANYTHING = Verify(
    prompt=80, generate=64, random=64, min_cosine=-1, min_cosine_fp16=-1, max_error=float("inf"), min_agreement=0
)


def measure(source: str, layout: str) -> dict[str, Any]:
    """Export in one layout and compare."""
    model = resolve_source(source)
    with tempfile.TemporaryDirectory() as folder:
        out, scratch = Path(folder, "out"), Path(folder, "scratch")
        out.mkdir()
        scratch.mkdir()
        ctx = StageContext(id="coreml", config=None, seed=0, inputs={}, out=out, scratch=scratch)
        config = CoremlConfig(layout, 512, 64, None, None, None, "inside", {}, "auto", ANYTHING)
        start = time.perf_counter()
        CoremlExporter().export(model, config, ctx)
        seconds = time.perf_counter() - start
    return {"model": source, "layout": layout, "seconds": round(seconds, 1), **ctx.metrics}


def main() -> None:
    """Measure both layouts, print and save."""
    source = sys.argv[1] if len(sys.argv) > 1 else "builtin:pico"
    rows = [measure(source, layout) for layout in LAYOUTS]
    save("coreml", rows)
    sizes = ["layout", "weight_bytes", "theory_bytes", "size_ratio", "bits_per_parameter", "bytes_per_token",
             "multiply_adds_per_token", "multiply_adds_ratio", "seconds"]  # fmt: skip
    print_table(f"Core ML packages of {source}", sizes, [[row[name] for name in sizes] for row in rows])
    names = ["positions", "cosine", "max_error", "kl", "agreement", "decisive", "decisive_agreement",
             "greedy_agreement", "overflows"]  # fmt: skip
    cells = [
        [row["layout"], precision, *(row[f"{name}_{precision}"] for name in names)]
        for row in rows
        for precision in ("fp32", "fp16")
    ]
    title = f"The packages, interpreted, against PyTorch; {ANYTHING.generate} tokens written greedily"
    print_table(title, ["layout", "precision", *names], cells)


if __name__ == "__main__":
    main()
