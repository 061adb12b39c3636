"""Run what is missing: `python -m benchmarks.quality [--only 'pico.w2.*'] [--seeds 0,1,2] [--jobs 2]`.

    --jobs N  cells at a time, each on one core; where times are compared, the same N for all
    --list    the cells, and which of them are there
    --table   only write and print the tables (benchmarks/results/quality/table.md, table.json)
    --plot    only draw the plot (kl.png, kl.svg)

A row is TEACHER.SETTING.METHOD; a cell has `.seedN` at its end, and `.lrRATE` before that where it trains. Results lie
in benchmarks/results/quality/cells; whatever is there with the right key is not run again, so the command may be
stopped and started at will. Peers need `benchmarks/quality/peers/setup.sh` first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.quality import layer
from benchmarks.quality.cells import LEARNING_RATES, Cell, Row, read_result, rows, wanted
from benchmarks.quality.protocol import SEEDS

ROOT = Path(__file__).parents[2]
SHOWN = 15
"""Lines of a failed cell's last words."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a cell failed, 2 for a pattern that matches nothing."""
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the cells and say which are there")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="rows or cells, as in 'pico.w2.*'")
    parser.add_argument("--seeds", type=_seeds, default=SEEDS, help="default 0,1,2")
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="cells at a time, default 1")
    parser.add_argument("--table", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--plot", action="store_true", help="only draw the plot of what is there")
    options = parser.parse_args(arguments)
    chosen = Choice(options.only)
    listed = [row for row in rows() if chosen.row(row, options.seeds)]
    with_layer = chosen.match(layer.NAME)
    if not listed and not with_layer:
        print(f"nothing is called {' or '.join(options.only)}; --list names what there is", file=sys.stderr)
        return 2
    if options.list:
        for row in listed:
            list_row(row, options.seeds, chosen)
        if with_layer:
            print(f"{layer.NAME:60} " + ("missing" if layer.known() is None else "there"))
        return 0
    failed: list[str] = []
    if not (options.table or options.plot):
        with ThreadPoolExecutor(options.jobs) as pool:
            for names in pool.map(lambda row: run_row(row, options.seeds, chosen), listed):
                failed += names
        if with_layer and layer.known() is None and not run_process(layer.NAME, ["benchmarks.quality.layer"]):
            failed.append(layer.NAME)
    if options.table or not options.plot:
        from benchmarks.quality.table import make_table

        print(make_table(options.seeds))
    if options.plot or not options.table:
        from benchmarks.quality.plot import make_plot

        print(*make_plot(options.seeds), sep="\n")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


class Choice:
    """What `--only` chose; everything without it."""

    def __init__(self, patterns: Sequence[str] | None):
        self.patterns = patterns

    def cell(self, cell: Cell) -> bool:
        """Whether a cell is chosen, by its own name or its row's."""
        return self.match(cell.name) or self.match(Row(cell.teacher, cell.setting, cell.method).name)

    def row(self, row: Row, seeds: Sequence[int]) -> bool:
        """Whether any cell is."""
        rates = LEARNING_RATES if row.grid() else (None,)
        return any(self.cell(cell) for lr in rates for cell in [*row.grid(), *row.cells(seeds, lr)])

    def match(self, name: str) -> bool:
        """Whether a name is."""
        return self.patterns is None or any(fnmatchcase(name, pattern) for pattern in self.patterns)


def run_row(row: Row, seeds: Sequence[int], chosen: Choice) -> list[str]:
    """Run the missing cells of a row, the grid before the seeds; names of those that failed."""
    results: dict[Cell, Any] = {}
    left_out: set[Cell] = set()
    while new := [cell for cell in wanted(row, seeds, results) if cell not in results and cell not in left_out]:
        for cell in new:
            if (found := read_result(cell)) is None and (chosen.cell(cell) or chosen.match(row.name)):
                if not run_cell(cell):
                    return [cell.name]
                found = read_result(cell)
            if found is None:
                left_out.add(cell)
            else:
                results[cell] = found
    if missing := [cell.name for cell in row.grid() if cell in left_out]:
        print(f"{row.name}: its learning rate is not chosen without {', '.join(missing)}", flush=True)
    return []


def run_cell(cell: Cell) -> bool:
    """Run one cell in a process of its own and say how it went; where another run is at it, wait for that one's."""
    from a1q.engine.files import home
    from a1q.engine.locks import wait_lock

    def tell(pid: str) -> None:
        print(f"{cell.name}: process {pid} is at it", flush=True)

    asked = [cell.teacher, cell.setting, cell.method, str(cell.seed), *([] if cell.lr is None else [str(cell.lr)])]
    # rows whose rate is chosen in one place all want the cells of that grid
    with wait_lock(home() / "quality" / "locks" / cell.name, True, lambda: 0, tell):
        if read_result(cell) is not None:
            return True
        if not run_process(cell.name, ["benchmarks.quality.measure", *asked]):
            return False
        result = read_result(cell)
    if result is None:
        print(f"{cell.name}: its key is another now: something that it hangs on changed meanwhile", flush=True)
        return False
    print(f"{cell.name}: {result['bpw']:.3f} bits, KL {_kl(result)}", flush=True)
    return True


def run_process(name: str, module: Sequence[str]) -> bool:
    """Run `python -m MODULE`; say how long it took, and its last words if it failed."""
    print(f"{name} ...", flush=True)
    began = time.perf_counter()
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - began
    if done.returncode:
        last = done.stdout.decode("utf-8", "replace").splitlines()[-SHOWN:]
        print(f"{name}: failed after {seconds:.0f} s\n  " + "\n  ".join(last), flush=True)
        return False
    print(f"{name}: {seconds:.0f} s", flush=True)
    return True


def list_row(row: Row, seeds: Sequence[int], chosen: Choice) -> None:
    """Name the cells of a row as far as they can be named by now."""
    results = {cell: found for cell in row.grid() if (found := read_result(cell)) is not None}
    for cell in wanted(row, seeds, results):
        if chosen.cell(cell):
            found = read_result(cell)
            print(f"{cell.name:60} " + ("missing" if found is None else f"KL {_kl(found)}"))


def _kl(result: Any) -> str:
    """Both sides in four significant digits."""
    found = {side: "not finite" if kl is None else f"{kl:#.4g}" for side, kl in result["kl"].items()}
    return f"{found['tune']} (tune) {found['test']} (test)"


def _jobs(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of cells")
    return int(text)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None


if __name__ == "__main__":
    sys.exit(main())
