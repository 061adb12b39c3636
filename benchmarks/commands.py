"""How long the commands take: `python -m benchmarks.commands [RUN]`.

Median and worst of several fresh processes. With RUN, a finished run folder of the demo, its recipe is run again,
fully cached, into that folder.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import print_table, save

RECIPE = "recipes/q4_to_q2.yaml"


def measure(arguments: list[str], repeats: int) -> tuple[float, float]:
    """Median and largest wall time in seconds of `a1q ARGUMENTS` in fresh processes."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "a1q", *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), max(seconds[1:])  # the first warms the file cache


def main() -> None:
    """Measure and print."""
    commands: list[tuple[list[str], int, float | None]] = [
        (["--help"], 11, 0.25),
        (["validate", RECIPE], 11, 0.5),
        (["plan", RECIPE], 5, None),
        (["describe", "train"], 5, None),
    ]
    if len(sys.argv) > 1:
        commands.append((["run", RECIPE, "-o", sys.argv[1]], 3, 5.0))
    rows: list[dict[str, Any]] = []
    for arguments, repeats, limit in commands:
        median, worst = measure(arguments, repeats)
        name = "a1q " + " ".join(arguments[:2]) + (" (fully cached)" if arguments[0] == "run" else "")
        rows.append({"command": name, "median_s": round(median, 3), "max_s": round(worst, 3), "limit_s": limit})
    save("commands", rows)
    print_table("Command times, seconds", list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
