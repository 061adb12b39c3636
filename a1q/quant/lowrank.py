"""Fits of Ŵ = LUT[idx] ⊙ S with S = A B of rank r: alternating least squares, and the SVD of group maxima.

Both work in the type of the weight they are given; the error is  Σ r_i h_j (W_ij - Ŵ_ij)²  with h = E[x²] per input and
r how much each row counts, ones but for an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from a1q.quant import straight_through
from a1q.quant.grid import lookup, nearest, sums_per_entry
from a1q.quant.kmeans import lloyd, quantile_start

PROXIMAL = 1e-6
"""Weight, relative to the mean diagonal, that pulls a least-squares step towards where it started. It keeps
singular systems solvable, and the step still never raises the error."""
STALL = 1e-4
"""Rounds end once one lowers the error by less than this share."""
START_STALL = 1e-3
"""The same of a fit that others start from: what it would still gain, they hardly keep."""
CLIPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Largest entry of a fixed LUT in units of the row-and-column rms: what the start tries."""


@dataclass
class Fit:
    """State of a fit; every field may be replaced by a step."""

    indices: Tensor
    """uint8 [out, in]"""
    lut: Tensor
    """[L], ascending"""
    a: Tensor
    """[out, r]"""
    b: Tensor
    """[r, in]"""

    def scale(self) -> Tensor:
        """S [out, in]"""
        return self.a @ self.b

    def weight(self) -> Tensor:
        """Ŵ [out, in]"""
        return lookup(self.lut[None], self.indices) * self.scale()


def weighted_error(weight: Tensor, approximation: Tensor, importance: Tensor, rows: Tensor | None = None) -> float:
    """Σ r_i h_j (W_ij - Ŵ_ij)²; rows are summed in float64."""
    per_row = ((weight - approximation).square() @ importance).double()
    return float(per_row.sum() if rows is None else per_row @ rows.double())


def linspace_lut(bits: int, like: Tensor) -> Tensor:
    """2**bits entries evenly from -1 to 1, in the type of `like`."""
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float64).to(like)


def absmax_svd(weight: Tensor, bits: int, rank: int, group_size: int) -> Fit:
    """The published start: S is the rank-r SVD of the groups' largest magnitudes, the LUT is evenly spaced.

    Maxima are taken over `group_size` consecutive inputs of a row (the last group may be shorter); the SVD is that
    of the expanded matrix, computed on the compact one with columns scaled by √(group length).
    """
    rows, columns = weight.shape
    lengths = [min(group_size, columns - start) for start in range(0, columns, group_size)]
    maxima = torch.stack([part.abs().amax(1) for part in weight.split(lengths, dim=1)], dim=1).clamp_min(1e-8)
    roots = torch.tensor(lengths, dtype=weight.dtype, device=weight.device).sqrt()
    u, s, vh = torch.linalg.svd(maxima * roots, full_matrices=False)
    kept = min(rank, len(s))
    a = weight.new_zeros(rows, rank)
    b = weight.new_zeros(rank, columns)
    a[:, :kept] = u[:, :kept] * s[:kept]
    b[:kept] = (vh[:kept] / roots).repeat_interleave(torch.tensor(lengths, device=weight.device), dim=1)
    if float(b[0].sum()) < 0:  # the first pair is positive up to a common sign (Perron)
        a[:, 0], b[0] = -a[:, 0], -b[0]
    lut = linspace_lut(bits, weight)
    return Fit(assign(weight, lut, a @ b), lut, a, b)


def als(
    weight: Tensor,
    importance: Tensor,
    bits: int,
    rank: int,
    learn_lut: bool,
    rounds: int,
    errors: list[float] | None = None,
    rows: Tensor | None = None,
    stall: float = STALL,
) -> Fit:
    """Alternating least squares over indices, LUT, A and B; no step raises the weighted error.

    The start is a rank-1 scale of row and column rms with the best LUT for it; further ranks start along the
    principal directions of the error's gradient by S.

    Args:
        weight: [out, in].
        importance: h [in], positive.
        rounds: at most so many.
        errors: where given, receives the weighted error of the start and after every round.
        rows: r [out], positive; ones by default.
        stall: rounds end once one lowers the error by less than this share.
    """
    rows = torch.ones_like(weight[:, 0]) if rows is None else rows
    fit = rms_start(weight, importance, rows, bits, learn_lut)
    if rank > 1:
        for _ in range(max(1, rounds // 4)):
            improve(fit, weight, importance, rows, learn_lut)
        widen(fit, weight, importance, rows, rank)
    trace = [weighted_error(weight, fit.weight(), importance, rows)]
    for _ in range(rounds):
        improve(fit, weight, importance, rows, learn_lut)
        trace.append(weighted_error(weight, fit.weight(), importance, rows))
        if trace[-1] > (1 - stall) * trace[-2]:
            break
    if errors is not None:
        errors += trace
    return fit


def improve(fit: Fit, weight: Tensor, importance: Tensor, rows: Tensor, learn_lut: bool) -> None:
    """One round: A, indices, B, indices, LUT, indices; each the exact minimiser with the others held."""
    entries = lookup(fit.lut[None], fit.indices)
    fit.a = solve_left(weight, entries, importance, fit.a, fit.b)
    fit.indices = assign(weight, fit.lut, fit.scale())
    entries = lookup(fit.lut[None], fit.indices)
    # The roles of rows and columns swap; h is constant within a column, so it cancels there, as r does above.
    fit.b = solve_left(weight.T, entries.T, rows, fit.b.T, fit.a.T).T.contiguous()
    scale = fit.scale()
    fit.indices = assign(weight, fit.lut, scale)
    if learn_lut:
        # Indices are fresh, so the cells are intervals and their centroids ascend.
        fit.lut = centroids(weight, fit.indices, fit.lut, scale, importance * rows[:, None])
        fit.indices = assign(weight, fit.lut, scale)


def assign(weight: Tensor, lut: Tensor, scale: Tensor) -> Tensor:
    """Indices uint8 [out, in] of the entries of `lut` [L] nearest to W / S."""
    return straight_through.assign(weight, lut[None], scale, None)


def centroids(weight: Tensor, indices: Tensor, lut: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """The LUT [L] of least error, weighted by `importance` [in] or [out, in], for given indices and scale.

    Unused entries stay.
    """
    weighted = scale * importance
    top = sums_per_entry(indices, weighted * weight, lut[None])[0]
    bottom = sums_per_entry(indices, weighted * scale, lut[None])[0]
    return torch.where(bottom > 0, top / bottom.clamp_min(torch.finfo(lut.dtype).tiny), lut)


def solve_left(weight: Tensor, entries: Tensor, importance: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The A [out, r] that minimises Σ h_j (W_ij - q_ij (A B)_ij)², near the present one where it is not unique.

    At rank 1 a positive A stays positive. Row i solves (Σ_j h_j q_ij² B_:j B_:jᵀ) a_i = Σ_j h_j q_ij W_ij B_:j.
    """
    rank = b.shape[0]
    normal = normal_matrices(entries.square() * importance, b).double()
    right = ((entries * weight * importance) @ b.T).double()
    pull = PROXIMAL * normal.diagonal(dim1=1, dim2=2).mean() + torch.finfo(torch.float64).tiny
    if rank == 1:  # rows are independent, so a row that would not be positive may keep its old value
        solved = ((right + pull * a.double()) * (1 / (normal[:, 0] + pull))).to(a.dtype)
        return torch.where(solved > 0, solved, a)
    factors, pulls = cholesky_factors(normal, pull.expand(len(normal)))
    return torch.cholesky_solve((right + pulls[:, None] * a.double())[..., None], factors)[..., 0].to(a.dtype)


def cholesky_factors(matrices: Tensor, pulls: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors [n, r, r] of M + p I for M [n, r, r] with no negative eigenvalue but by rounding, and p [n].

    Where `pulls` [n] > 0 are no match for the rounding they grow, a hundredfold at a time. LU would not ask for that,
    but LU factors of many large matrices come out wrong of MKL's threads.
    """
    one = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    while True:
        factors, failed = torch.linalg.cholesky_ex(matrices + pulls[:, None, None] * one)
        if not bool(failed.any()):
            return factors, pulls
        pulls = torch.where(failed > 0, 100 * pulls, pulls)


def normal_matrices(weights: Tensor, factors: Tensor) -> Tensor:
    """Σ_j c_ij f_:j f_:jᵀ  [m, r, r] for c [m, n] and factors f [r, n]."""
    rank = len(factors)
    outer = (factors[:, None, :] * factors[None, :, :]).reshape(rank * rank, -1)
    return (weights @ outer.T).reshape(-1, rank, rank)


def unit_gain(fit: Fit, weight: Tensor, importance: Tensor) -> Tensor:
    """Factors [out] by which rows of Ŵ have to grow to answer W's own inputs as strongly as W: Σ h W² / Σ h W Ŵ.

    Least squares shrinks: its Ŵ is W less what is not explained, so that every layer's output comes out too small, and
    layers in a row multiply that. Unit gain costs squared error and lowers the KL of the whole model.
    """
    whole = weight.square() @ importance
    common = (weight * fit.weight()) @ importance
    return torch.where(common > 0, whole / common.clamp_min(torch.finfo(common.dtype).tiny), 1.0).to(weight.dtype)


def rms_start(weight: Tensor, importance: Tensor, rows: Tensor, bits: int, learn_lut: bool) -> Fit:
    """Rank-1 scale a b with a_i² b_j² ≈ W_ij² (rows and columns evened out in turn), and the best LUT for it."""
    square = weight.square()
    tiny = torch.finfo(weight.dtype).tiny
    b = torch.ones_like(importance)
    for _ in range(4):
        a = (square / b.square()).mean(1).sqrt().clamp_min(tiny**0.5)
        b = (square / a.square()[:, None]).mean(0).sqrt().clamp_min(1e-4)
    scale = a[:, None] * b
    z, use = weight / scale, scale.square() * importance * rows[:, None]
    if learn_lut:
        lut = lloyd(z, use, quantile_start(z.reshape(1, -1), 2**bits), rounds=30)[0]
    else:
        even = linspace_lut(bits, weight)
        losses = [weighted_error(weight, _nearest_on(z, even * clip) * scale, importance, rows) for clip in CLIPS]
        clip = CLIPS[losses.index(min(losses))]
        a, scale, lut = a * clip, scale * clip, even
    return Fit(assign(weight, lut, scale), lut, a[:, None], b[None])


def widen(fit: Fit, weight: Tensor, importance: Tensor, rows: Tensor, rank: int) -> None:
    """Add ranks along the principal input directions of the error's gradient by S; A there starts at zero."""
    entries = lookup(fit.lut[None], fit.indices)
    gradient = entries * (weight - entries * fit.scale()) * importance * rows[:, None]
    missing = rank - fit.b.shape[0]
    directions = principal_directions(gradient, missing)
    fit.b = torch.cat([fit.b, directions * fit.b.norm()])
    fit.a = torch.cat([fit.a, fit.a.new_zeros(len(fit.a), missing)], dim=1)


def principal_directions(matrix: Tensor, count: int) -> Tensor:
    """About the first `count` right singular vectors of `matrix` [m, n], as rows [count, n] of unit length.

    Subspace iteration with oversampling (Halko, Martinsson and Tropp, 2011) from a fixed random start.
    """
    columns = matrix.shape[1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, min(count + 8, columns), generator=generator, dtype=torch.float64).to(matrix)
    basis = torch.linalg.qr(start).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    _, _, rotation = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return rotation[:count] @ basis.T


def balance(fit: Fit) -> tuple[Tensor, Tensor, Tensor]:
    """(a, g, b) with the same A diag(g) B, where a's column, g and b's row have equal rms in every rank.

    All trained numbers then have similar size, as optimisers with one step size for all of them need.
    """
    size_a = fit.a.square().mean(0).sqrt()
    size_b = fit.b.square().mean(1).sqrt()
    common = (size_a * size_b) ** (1 / 3)
    scale_a = torch.where(size_a > 0, common / size_a.clamp_min(1e-30), 0.0)
    scale_b = torch.where(size_b > 0, common / size_b.clamp_min(1e-30), 0.0)
    return fit.a * scale_a, common, fit.b * scale_b[:, None]


def _nearest_on(values: Tensor, lut: Tensor) -> Tensor:
    return lookup(lut[None], nearest(values, lut[None]))
