"""Whether indices into tables of vectors say a weight better than as many bits of scalar ones.

`python -m benchmarks.quality.vector_codebooks [TEACHER ...]` fits every decoder linear in each way, all with a row
scale times a column scale, error feedback, coordinate descent and least squares under E[x xᵀ], as often:

    scalar     4 numbers, as `lut_lowrank` fits them
    outputs    16 pairs, of two consecutive rows each, at 4 bits per index
    inputs     16 pairs, of two consecutive columns each
    tables     4 numbers for every eighth of the rows: as many bits as pairs
    fours      256 vectors of four consecutive rows, at 8 bits per index

Errors are Σ (w - ŵ)ᵀ E[x xᵀ] (w - ŵ), as geometric means over linears; KL is the whole model's on the tune side.
Every number of a table is counted, and all are fp16.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a1q.quant.feedback import damped, descend, quadratic_error, sweep
from a1q.quant.gram_least_squares import conjugate_gradients, solve_columns, solve_rows
from a1q.quant.grid import round_fp16
from benchmarks.common import RESULTS, print_table, save

NAME = "vector_codebooks"
TEACHERS = ("pico", "pico-heavy")
SEED = 0
SEQUENCES = 256
"""Of the train side, for E[x xᵀ]."""
BITS, DAMPING, SWEEPS, PASSES, ROUNDS = 2, 0.01, 4, 3, 20
"""As `lut_lowrank` has them by default."""
SAMPLE, STARTS, ITERATIONS = 1 << 14, 4, 40
"""k-means: vectors looked at, random starts, and rounds of each."""
QWEN = [(2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (3072, 1024), (1024, 3072)]
"""The linears of one layer of Qwen3-0.6B, where a table weighs less than in pico."""


@dataclass(frozen=True)
class Way:
    """How numbers are looked up: `tables` of 2**(BITS size) vectors of `size` numbers each."""

    size: int = 1
    along: str = "outputs"
    tables: int = 1
    spread: float = 1.12
    """How much wider than k-means error feedback starts; of 1, 1.12 and 1.25 the best for vectors."""

    @property
    def entries(self) -> int:
        """Vectors in a table."""
        return 2 ** (BITS * self.size)

    def bits(self, rows: int, columns: int) -> int:
        """All bits of a weight [rows, columns]."""
        return BITS * rows * columns + 16 * (self.tables * self.entries * self.size + rows + columns)


WAYS = {
    "scalar": Way(),
    "outputs": Way(2),
    "inputs": Way(2, along="inputs"),
    "tables": Way(tables=8, spread=1.25),
    "fours": Way(4),
}
CURVE = 4.0
"""What one bit more per weight divides the squared error by, where rates are high: 6.02 dB."""


class OutputVectors:
    """The grid of `a1q.quant.feedback` whose vectors lie along the rows of a column."""

    def __init__(self, table: Tensor, a: Tensor, b: Tensor):
        """Take vectors [tables, L, d], a row scale [out] and a column scale [in], both positive."""
        tables, entries, self.size = table.shape
        spread = table.repeat_interleave(len(a) // self.size // tables, dim=0)
        self.scaled = spread * a.reshape(-1, 1, self.size)
        """[out / d, L, d]"""
        self.squares = self.scaled.square().sum(-1)
        self.columns = b.tolist()
        self.places = torch.arange(len(self.scaled)) * entries

    def nearest(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes uint8 [out], each `size` times, and values [out]."""
        vectors = values.reshape(-1, self.size, 1) / self.columns[column]
        codes = (self.squares - 2 * (self.scaled @ vectors)[..., 0]).argmin(1)
        found = self.scaled.reshape(-1, self.size)[self.places + codes] * self.columns[column]
        return codes.to(torch.uint8).repeat_interleave(self.size), found.reshape(-1)


class InputVectors:
    """Vectors along the columns of a row; several columns are rounded at a time, under a metric of their own."""

    def __init__(self, table: Tensor, a: Tensor, b: Tensor):
        """Take vectors [1, L, d], a row scale [out] and a column scale [in], both positive."""
        self.table, self.a, self.b = table[0], a[:, None], b
        self.size = table.shape[2]

    def nearest(self, values: Tensor, start: int, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [out] and values [out, d] of least |(values - found) F|, F [d, d], for columns from `start`."""
        scaled = self.table * self.b[start : start + self.size]
        seen = scaled @ factor
        codes = (seen.square().sum(1) - 2 * (values / self.a) @ (factor @ seen.T)).argmin(1)
        return codes.to(torch.uint8), scaled[codes] * self.a


def sweep_vectors(weight: Tensor, h: Tensor, grid: InputVectors) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, in] (each d times) and values by error feedback, d columns at a time.

    With U the upper Cholesky factor of H⁻¹, columns P cost |e U_PP⁻¹|² once those to come make up for their error e,
    which then lose  e U_PP⁻¹ U_PF.
    """
    size = grid.size
    order = h.diagonal().reshape(-1, size).sum(1).argsort(descending=True, stable=True)
    places = (order[:, None] * size + torch.arange(size)).reshape(-1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[places][:, places]))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    left = weight[:, places].T.contiguous()
    codes, values = torch.empty(left.shape, dtype=torch.uint8), torch.empty_like(left)
    for begin, group in zip(range(0, len(places), size), order.tolist(), strict=True):
        end = begin + size
        factor = torch.linalg.inv(upper[begin:end, begin:end])
        codes[begin:end], found = grid.nearest(left[begin:end].T, group * size, factor)
        values[begin:end] = found.T
        errors = factor.T @ (left[begin:end] - values[begin:end])
        left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    back = places.argsort()
    return codes[back].T.contiguous(), values[back].T.contiguous()


def descend_vectors(
    weight: Tensor, h: Tensor, grid: InputVectors, codes: Tensor, values: Tensor, passes: int
) -> tuple[Tensor, Tensor]:
    """Better codes and values by coordinate descent over d columns at a time; no pass raises the error."""
    size, h = grid.size, h.to(weight.dtype)
    codes, values = codes.T.clone(), values.T.clone()
    pull = h @ (weight.T - values)
    starts = range(0, len(h), size)
    blocks = [h[start : start + size, start : start + size] for start in starts]
    factors = [(torch.linalg.inv(block), torch.linalg.cholesky(block)) for block in blocks]
    for _ in range(passes):
        before = codes.clone()
        for start, (inverse, factor) in zip(starts, factors, strict=True):
            place = slice(start, start + size)
            old = values[place].clone()
            codes[place], found = grid.nearest((old + inverse @ pull[place]).T, start, factor)
            values[place] = found.T
            pull.addmm_(h[:, place], values[place] - old, alpha=-1)
        if torch.equal(codes, before):
            break
    return codes.T.contiguous(), values.T.contiguous()


class State:
    """Vectors ⊙ (a b): where a fit stands."""

    def __init__(self, weight: Tensor, h: Tensor, way: Way, table: Tensor, a: Tensor, b: Tensor):
        """Take W [out, in], H [in, in], vectors [tables, L, d], a [out], b [in]."""
        self.weight, self.h, self.way = weight, h.to(weight.dtype), way
        self.table, self.a, self.b = table, a, b
        rows, columns = (torch.arange(count) for count in weight.shape)
        inside = rows[:, None] if way.along == "outputs" else columns[None]
        self.first = inside % way.size + (rows * way.tables // len(rows) * way.entries * way.size)[:, None]

    def improved(self, codes: Tensor | None = None) -> Tensor:
        """Codes uint8 [out, in], each as often as its vector is long: after a new sweep, or better than `codes`."""
        if self.way.along == "outputs":
            grid = OutputVectors(self.table, self.a, self.b)
            start = sweep(self.weight, self.h.double(), grid) if codes is None else (codes, self.values(codes))
            return descend(self.weight, self.h, grid, *start, PASSES)[0]
        other = InputVectors(self.table, self.a, self.b)
        start = sweep_vectors(self.weight, self.h.double(), other) if codes is None else (codes, self.values(codes))
        return descend_vectors(self.weight, self.h, other, *start, PASSES)[0]

    def values(self, codes: Tensor) -> Tensor:
        """Ŵ [out, in]"""
        return self.table.reshape(-1)[self._places(codes)] * self.a[:, None] * self.b

    def solve(self, codes: Tensor) -> None:
        """Least squares of a, b and the table in turn, with `codes` held."""
        places, ones = self._places(codes), torch.ones_like(self.a)
        entries = self.table.reshape(-1)[places]
        self.a = solve_rows(self.weight, entries, self.h, self.a[:, None], self.b[None])[:, 0]
        self.b = solve_columns(self.weight, entries, self.h, self.a[:, None], self.b[None], ones)[0]
        scale, flat = self.a[:, None] * self.b, places.reshape(-1)

        def gather(product: Tensor) -> Tensor:
            return torch.bincount(flat, (product * scale).reshape(-1), self.table.numel()).to(scale.dtype)

        def forth(x: Tensor) -> Tensor:
            return x[flat].reshape(scale.shape) * scale

        start = self.table.reshape(-1)
        residual = gather((self.weight - forth(start)) @ self.h)
        diagonal = gather(scale * self.h.diagonal()).clamp_min(torch.finfo(scale.dtype).tiny)
        found = conjugate_gradients(lambda x: gather(forth(x) @ self.h), residual, start, lambda x: x / diagonal)
        self.table = found.reshape(self.table.shape)

    def snapped(self, codes: Tensor) -> Tensor:
        """Ŵ with everything rounded to fp16."""
        self.table, self.a, self.b = round_fp16(self.table), round_fp16(self.a), round_fp16(self.b)
        return self.values(codes)

    def _places(self, codes: Tensor) -> Tensor:
        return self.first + codes.long() * self.way.size


def vectors_of(matrix: Tensor, way: Way) -> Tensor:
    """[n, d] of a matrix [out, in], table by table."""
    if way.along == "inputs":
        return matrix.reshape(-1, way.size)
    return matrix.reshape(-1, way.size, matrix.shape[1]).transpose(1, 2).reshape(-1, way.size)


def kmeans(vectors: Tensor, use: Tensor, entries: int) -> Tensor:
    """[L, d] of least  Σ use (vector - its entry)²  for n vectors [n, d], the best of `STARTS` starts of Lloyd's."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(vectors), generator=random)[:SAMPLE]
    vectors, use = vectors[chosen], use[chosen]
    best: tuple[float, Tensor] | None = None
    for _ in range(STARTS):
        table = vectors[torch.randperm(len(vectors), generator=random)[:entries]]
        for _ in range(ITERATIONS):
            distance = use @ table.square().T - 2 * (use * vectors) @ table.T
            least, codes = distance.min(1)
            mass = torch.zeros_like(table).index_add_(0, codes, use)
            mean = torch.zeros_like(table).index_add_(0, codes, use * vectors) / mass.clamp_min(1e-30)
            table = torch.where(mass > 0, mean, table)
        error = float(least.double().sum())
        if best is None or error < best[0]:
            best = error, table
    assert best is not None
    return best[1]


def fit(weight: Tensor, gram: Tensor, way: Way) -> Tensor:
    """Ŵ [out, in] in one way, from the rank-1 scale of `a1q.quant.lowrank.als`."""
    from a1q.quant import lowrank
    from a1q.quant.importance import Inputs, importance_of

    importance = importance_of(weight, Inputs(gram.diagonal()))
    start = lowrank.als(weight, importance, BITS, 1, True, ROUNDS)
    scale = start.scale()
    z, use = vectors_of(weight / scale, way), vectors_of(scale.square() * importance, way)
    table = torch.stack(
        [kmeans(*part, way.entries) for part in zip(z.chunk(way.tables), use.chunk(way.tables), strict=True)]
    )
    h = damped(gram, DAMPING)
    state = State(weight, h, way, table * way.spread, start.a[:, 0], start.b[0])
    rounds = []
    for _ in range(SWEEPS):
        state = copy(state)
        codes = state.improved()
        state.solve(codes)
        rounds.append((quadratic_error(weight, state.values(codes), h), state, codes))
    _, state, codes = min(rounds, key=lambda found: found[0])
    return state.snapped(state.improved(codes))


def fit_scalar(weight: Tensor, gram: Tensor) -> Tensor:
    """Ŵ [out, in] as `lut_lowrank` at rank 1 has it."""
    from a1q.quant.build import complete, make_scheme
    from a1q.quant.importance import Inputs

    scheme = make_scheme(complete({"scheme": "lut_lowrank", "bits": BITS}))
    return scheme.dequantize(scheme.snap(scheme.fit(weight, Inputs(gram.diagonal(), gram), 0)))


def measure(teacher: str) -> None:
    """Fit a teacher in every way; figures are written as they come."""
    from a1q.distill.evaluate import evaluate_model
    from a1q.models.checkpoint import load_model
    from a1q.quant.calibration import measure_statistics
    from a1q.quant.statistics import Statistics
    from benchmarks.quality.measure import put_weights
    from benchmarks.quality.protocol import held_out, seed_tokens
    from benchmarks.quality.teachers import linears, teacher_folder

    torch.set_num_threads(1)
    folder = teacher_folder(teacher)
    model, student = load_model(folder), load_model(folder)
    with tempfile.TemporaryDirectory() as scratch:
        measure_statistics(model, seed_tokens(folder, SEED).calibration[:SEQUENCES], Path(scratch), batch_size=16)
        statistics = Statistics(Path(scratch))
        inputs = {name: statistics.inputs(name) for name, _ in linears(model)}
    for name, way in WAYS.items():
        began, errors, weights = time.process_time(), {}, {}
        for place, linear in linears(model):
            weight, gram = linear.weight.detach().float(), inputs[place].gram
            found = fit_scalar(weight, gram) if name == "scalar" else fit(weight, gram, way)
            whole = quadratic_error(weight, torch.zeros_like(weight), gram)
            errors[place] = quadratic_error(weight, found, gram) / whole
            weights[f"{place}.weight"] = found
        seconds = time.process_time() - began
        put_weights(student, weights)
        record(
            {
                "teacher": teacher,
                "way": name,
                "kl": evaluate_model(student, model, held_out(folder, "tune"))["kl"],
                "bpw": bits_per_weight(way, [tuple(weight.shape) for weight in weights.values()]),
                "errors": errors,
                "processor_seconds": seconds,
            }
        )


def bits_per_weight(way: Way, shapes: list[tuple[int, int]]) -> float:
    """Over weights of these shapes, tables and scales included."""
    return sum(way.bits(*shape) for shape in shapes) / sum(rows * columns for rows, columns in shapes)


def known() -> list[dict[str, Any]]:
    """The figures on disk."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def record(row: dict[str, Any]) -> None:
    """Write one row in the place of the one before it."""
    same = ("teacher", "way")
    rows = [other for other in known() if any(other[key] != row[key] for key in same)]
    save(NAME, sorted([*rows, row], key=lambda found: (found["teacher"], list(WAYS).index(found["way"]))))


def lines(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """A table's lines: everything relative to the scalar of the same teacher."""
    found = []
    for row in rows:
        scalar = next(other for other in rows if other["teacher"] == row["teacher"] and other["way"] == "scalar")
        logs = [math.log(error / scalar["errors"][name]) for name, error in row["errors"].items()]
        ratio = math.exp(sum(logs) / len(logs))
        more = row["bpw"] - scalar["bpw"]
        large, scalar_large = bits_per_weight(WAYS[row["way"]], QWEN), bits_per_weight(WAYS["scalar"], QWEN)
        found.append(
            [
                row["teacher"],
                row["way"],
                f"{row['bpw']:.4f}",
                f"{ratio:.3f}",
                f"{ratio * CURVE**more:.3f}",
                f"{row['kl']:.4f}",
                f"{row['kl'] / scalar['kl']:.3f}",
                f"{large:.4f}",
                f"{ratio * CURVE ** (large - scalar_large):.3f}",
            ]
        )
    return found


def main(teachers: list[str]) -> None:
    """Measure and print what there is."""
    for teacher in teachers:
        measure(teacher)
    header = ["teacher", "way", "bits", "error", "at equal bits", "KL", "of scalar", "bits, 0.6B", "error there"]
    print_table("Tables of vectors against tables of numbers, 2 bits", header, lines(known()))


if __name__ == "__main__":
    main(sys.argv[1:] or list(TEACHERS))
