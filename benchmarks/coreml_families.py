"""Every decoder family in every layout, as packages against PyTorch: `python -m benchmarks.coreml_families`.

A tiny random model of each family, its weights rounded to fp16, is exported, read back and interpreted over 64 random
tokens, through `prefill` and token by token, in fp32 and in emulated fp16. Exits 1 if a limit is missed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from a1q.coreml.architecture import FAMILIES
from a1q.coreml.bundle import read_bundle
from a1q.coreml.layouts import LAYOUTS
from a1q.coreml.reference import references, sequences
from a1q.coreml.thresholds import Verify
from a1q.coreml.verify import verify_bundle
from a1q.engine.artifact import Artifact
from a1q.engine.stage import StageContext
from a1q.exporters.coreml import CoremlConfig, CoremlExporter
from benchmarks.common import print_table, save
from tests.tiny import tiny_family, write_tokenizer

TOKENS, LEAST_DISTINCT = 64, 16
ANYTHING = Verify(
    prompt=0, generate=0, random=TOKENS, min_cosine=-1, min_cosine_fp16=-1, max_error=float("inf"), min_agreement=0
)
LIMITS = {"cosine_fp32": 0.99999, "agreement_fp32": 1.0, "cosine_fp16": 0.9999, "decisive_fp16": 0.8,
          "decisive_agreement_fp16": 1.0}  # fmt: skip
"""Least values. `decisive_fp16` is the share of positions where the first choice leads by 4 times the largest error."""


def measure(family: str, layout: str, folder: Path) -> dict[str, Any]:
    """Export one model in one layout and compare."""
    import torch

    model = tiny_family(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    source, out, scratch = folder / "model", folder / "out", folder / "scratch"
    for path in (source, out, scratch):
        path.mkdir(parents=True)
    model.save_pretrained(source)
    write_tokenizer(source)
    ctx = StageContext(id="coreml", config=None, seed=0, inputs={}, out=out, scratch=scratch)
    config = CoremlConfig(layout, 128, 32, None, None, None, "inside", {}, "auto", None)
    CoremlExporter().export(Artifact("model", source, "benchmark"), config, ctx)
    expected = references(model, sequences(source, model.config.vocab_size, 0, 0, TOKENS))
    report = verify_bundle(read_bundle(out), expected, ANYTHING)
    distinct = len(set(expected[0].logits.argmax(axis=1).tolist()))
    return {"family": family, "layout": layout, "distinct": distinct, **report.metrics()}


def main() -> None:
    """Measure all, print, save, and say what is missed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in sorted(FAMILIES):
            for layout in LAYOUTS:
                rows.append(measure(family, layout, Path(folder, f"{family}-{layout}")))
    save("coreml_families", rows)
    header = ["family", "layout", "positions_fp32", "distinct", *LIMITS, "max_error_fp32", "max_error_fp16"]
    cells = [[f"{row[name]:.8g}" if isinstance(row[name], float) else row[name] for name in header] for row in rows]
    print_table("Packages of tiny random models, interpreted, against PyTorch", header, cells)
    missed = [
        f"{row['family']} {row['layout']}: {name} is {row[name]:.8g}, wanted {least}"
        for row in rows
        for name, least in {**LIMITS, "distinct": LEAST_DISTINCT}.items()
        if row[name] < least
    ]
    for line in missed:
        print(f"missed: {line}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
