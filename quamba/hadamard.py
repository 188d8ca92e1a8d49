"""Hadamard matrices: construction, and the orthonormal transform that rotates a dimension."""

from functools import lru_cache

import torch
from torch import Tensor


def _jacobsthal_prime(q: int) -> Tensor:
    residues = {(i * i) % q for i in range(1, q)}
    chi = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, q)])
    index = (torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q
    return chi[index]


@lru_cache
def _base(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    q = order - 1
    core = _jacobsthal_prime(q)
    h = torch.ones(order, order, dtype=torch.int64)
    h[1:, 1:] = core - torch.eye(q, dtype=torch.int64)
    h[1:, 0] = -1
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int64))
    return h


def decompose(size: int) -> tuple[int, int, int]:
    """size = blocks * 2^k * base; returns (blocks, 2^k, base). Placeholder set of bases: 1, 12, 20."""
    for base in (1, 12, 20):
        if size % base == 0:
            power = size // base
            if power & (power - 1) == 0:
                return 1, power, base
    power = size & -size
    return size // power, power, 1


@lru_cache
def _matrix(size: int) -> Tensor:
    blocks, power, base = decompose(size)
    h = _base(base)
    while h.shape[0] < power * base:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h.to(torch.float64) / h.shape[0] ** 0.5] * blocks)


def matrix(size: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal (size, size) matrix of the transform."""
    return _matrix(size).to(device=device, dtype=dtype)
