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

from a1q.engine.stage import StageContext
from a1q.exporters.coreml import CoremlConfig, CoremlExporter, Verify
from a1q.models.source import resolve_source
from benchmarks.common import print_table, save

ANYTHING = Verify(prompt=80, generate=32, min_cosine=-1, min_cosine_fp16=-1, min_agreement=0)


def main() -> None:
    """Export, compare and print."""
    source = sys.argv[1] if len(sys.argv) > 1 else "builtin:pico"
    model = resolve_source(source)
    with tempfile.TemporaryDirectory() as folder:
        out, scratch = Path(folder, "out"), Path(folder, "scratch")
        out.mkdir()
        scratch.mkdir()
        ctx = StageContext(id="coreml", config=None, seed=0, inputs={}, out=out, scratch=scratch)
        start = time.perf_counter()
        CoremlExporter().export(model, CoremlConfig("single", 512, 64, ANYTHING), ctx)
        seconds = time.perf_counter() - start
    figures = {"model": source, "seconds": round(seconds, 1), **ctx.metrics}
    save("coreml", [figures])
    sizes = ["weight_bytes", "theory_bytes", "size_ratio", "seconds"]
    print_table(f"Core ML package of {source}", sizes, [[figures[name] for name in sizes]])
    names = ["cosine", "cosine_mean", "max_error", "kl", "greedy_agreement", "overflows"]
    rows = [[precision, *(figures[f"{name}_{precision}"] for name in names)] for precision in ("fp32", "fp16")]
    title = f"The package, interpreted over {figures['positions']} positions, against PyTorch"
    print_table(title, ["precision", *names], rows)


if __name__ == "__main__":
    main()
