"""Random orthogonal matrices: a Hadamard matrix with random signs where there is one of the size, else from QR."""

from __future__ import annotations

import torch
from torch import Tensor


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Q [size, size] float64 with Q Qᵀ = I.

    diag(d) H / √size with random signs d, as in QuIP# (Tseng et al., 2024): every entry has the same magnitude, so one
    large coordinate is spread evenly over all. Without a Hadamard matrix of this size, Q of the QR decomposition of a
    Gaussian matrix, its signs chosen so that all rotations are equally likely (Mezzadri, 2007).
    """
    matrix = hadamard(size)
    if matrix is not None:
        signs = torch.randint(2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
        return signs * matrix / size**0.5
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def hadamard(size: int) -> Tensor | None:
    """H [size, size] float64 of ±1 with H Hᵀ = size · I: Sylvester's doubling of 1 or of the smallest Paley matrix that
    fits; None if neither gives this size."""
    cores = [size]
    while cores[0] % 2 == 0:
        cores.insert(0, cores[0] // 2)
    for core in cores:
        matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
        if matrix is not None:
            pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            while len(matrix) < size:
                matrix = torch.kron(pair, matrix)
            return matrix
    return None


def _paley(size: int) -> Tensor | None:
    """Paley's matrices (1933): of size q + 1 for primes q = 3 mod 4, of size 2 (q + 1) for primes q = 1 mod 4."""
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        conference = _conference(size - 1, -1)
        return conference + torch.eye(size, dtype=torch.float64)
    q = size // 2 - 1
    if size % 2 == 0 and _is_prime(q) and q % 4 == 1:
        one = torch.eye(q + 1, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_conference(q, 1), plus) + torch.kron(one, minus)
    return None


def _conference(q: int, sign: int) -> Tensor:
    """[[0, 1], [sign · 1, Jacobsthal matrix of q]], [q + 1, q + 1]: zero diagonal, orthogonal rows of ±1."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    matrix[1:, 1:] = character[(index[:, None] - index) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
