"""Hadamard matrices: their construction, and the orthonormal transform that rotates a dimension.

Layout, binding for every kernel: the matrix of one block is H = kron(B, S), with B the base matrix of order `base`
and S the Sylvester matrix of order `power` = 2^k, S[i, j] = (-1)^popcount(i & j). So the element with base index i
and power index j stands at i * power + j: the 2^k part is the fast, contiguous one. Sizes without a Hadamard matrix
(that can be built here) are split in equal consecutive blocks, each transformed by itself: the element stands at
block * base * power + i * power + j. A vector is rotated as H g / sqrt(base * power); rows of a tensor x as x H^T.

Constructions: Paley I, order q + 1 for a prime power q = 3 mod 4; Paley II, order 2 (q + 1) for q = 1 mod 4
(R. E. A. C. Paley, 1933); Williamson, order 4 t from four symmetric circulants of order t (J. Williamson, 1944).
"""

import itertools
import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quamba.errors import SizeError

Signs = npt.NDArray[np.int8]

# Larger bases exist, but a kernel keeps a base matrix on chip; sizes that would need one are split in blocks.
MAX_BASE = 256

# Entries 1 .. (t - 1) / 2 of the first rows of Williamson's circulants (entry 0 is +), for the orders 4 t that
# neither of Paley's constructions reaches. Found by search; `base_matrix` is verified for each in the tests.
_WILLIAMSON = {
    23: ("+-+-++-+--+", "-+++++---+-", "--++---+-+-", "---+++++++-"),
    29: ("--++----+-++++", "--+---+-+--+++", "+--++-+-++++--", "-+++-+++--+-++"),
}


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = p^m and p prime, or None."""
    p = next((d for d in range(2, q + 1) if q % d == 0), 0)
    m = 0
    while p and q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if p and q == 1 else None


def _jacobsthal(p: int, m: int) -> Signs:
    """Q[a, b] = chi(a - b) over GF(p^m): 1 for squares, -1 for the other nonzero elements, 0 for zero.

    Elements are polynomials over GF(p) modulo x^m = r(x), with r chosen so that x generates the multiplicative
    group: the even powers of x are then the squares.
    """
    q = p**m
    elements = np.array(list(itertools.product(range(p), repeat=m)))
    place = p ** np.arange(m)[::-1]
    for r in itertools.product(range(p), repeat=m):
        chi = np.zeros(q, dtype=np.int8)
        element = np.eye(1, m, dtype=np.int64)[0]
        for exponent in range(q - 1):  # visits all nonzero elements only if x generates the group
            chi[element @ place] = 1 - 2 * (exponent % 2)
            element = (np.append(0, element[:-1]) + element[-1] * np.array(r)) % p
        if chi[0] == 0 and np.count_nonzero(chi) == q - 1:
            core: Signs = chi[((elements[:, None] - elements[None]) % p) @ place]
            return core
    raise AssertionError(f"GF({q}) has no primitive polynomial")


def _bordered(core: Signs, sign: int) -> Signs:
    q = len(core)
    bordered = np.ones((q + 1, q + 1), dtype=np.int8)
    bordered[0, 0] = 0
    bordered[1:, 0] = sign
    bordered[1:, 1:] = core
    return bordered


def _williamson(rows: tuple[str, ...]) -> Signs:
    circulants = []
    for row in rows:
        half = [1 if sign == "+" else -1 for sign in row]
        first = np.array([1, *half, *half[::-1]], dtype=np.int8)
        circulants.append(np.stack([np.roll(first, shift) for shift in range(len(first))]))
    a, b, c, d = circulants
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


@lru_cache
def _base(order: int) -> Signs | None:
    """A Hadamard matrix of this order by Paley or Williamson, or None where neither gives one (here)."""
    if order == 1:
        return np.ones((1, 1), dtype=np.int8)
    if order % 4 or order > MAX_BASE:
        return None
    if field := _prime_power(order - 1):
        return _bordered(_jacobsthal(*field), -1) + np.eye(order, dtype=np.int8)
    if (order // 2) % 4 == 2 and (field := _prime_power(order // 2 - 1)):
        symmetric = _bordered(_jacobsthal(*field), 1)
        plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return (np.kron(symmetric, plus) + np.kron(np.eye(order // 2), minus)).astype(np.int8)
    return _williamson(_WILLIAMSON[order // 4]) if order // 4 in _WILLIAMSON else None


def _sylvester(power: int) -> Signs:
    h = np.ones((1, 1), dtype=np.int8)
    while len(h) < power:
        h = np.block([[h, h], [h, -h]])
    return h


@lru_cache
def decompose(size: int) -> tuple[int, int, int]:
    """The largest Hadamard order that divides `size`, and how it is built.

    Args:
        size: the length of the dimension, >= 1.

    Returns:
        (blocks, power, base): size = blocks * power * base, power a power of two, base the smallest order of a base
        matrix that serves (1, 12, 20, 28, 36, 44, ..., at most MAX_BASE). blocks is 1 wherever an order fits.

    Raises:
        SizeError: size is not positive.
    """
    if size <= 0:
        raise SizeError(f"found a size of {size} for a Hadamard transform; expected a positive one")
    twos = size & -size
    odd = size // twos
    for factor in sorted((d for d in range(1, odd + 1) if odd % d == 0), reverse=True):
        base = factor
        while base <= twos * factor:
            if _base(base) is not None:
                return odd // factor, twos * factor // base, base
            base *= 2
    raise AssertionError("order 1 divides every size")


def base_matrix(order: int) -> Tensor:
    """The base matrix of +1 and -1 as int8 (order, order), for an order that `decompose` returns.

    Raises:
        SizeError: there is no base matrix of this order.
    """
    signs = _base(order) if order > 0 else None
    if signs is None:
        raise SizeError(f"found no base matrix of order {order}; expected the base that decompose(size) returns")
    return torch.from_numpy(signs.copy())


def matrix(size: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal (size, size) matrix of the transform: block-diagonal where `decompose` says blocks > 1."""
    blocks, power, base = decompose(size)
    block = np.kron(base_matrix(base).numpy(), _sylvester(power))
    signs = torch.from_numpy(np.kron(np.eye(blocks, dtype=np.int8), block))
    return signs.to(device=device, dtype=dtype) / math.sqrt(base * power)


@lru_cache
def _factor_signs(size: int) -> tuple[Signs, Signs]:
    """(left, right) with one block's H = kron(left, right), as nearly of one order as the powers of two allow."""
    _, power, base = decompose(size)
    right = min((2**k for k in range(power.bit_length())), key=lambda r: power // r * base + r)
    return np.kron(base_matrix(base).numpy(), _sylvester(power // right)), _sylvester(right)


def factors(size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The two matrices of the fast transform of one block: (left, right), left orthogonal and right orthonormal.

    With X the block as a (left order, right order) matrix in row-major order, the transform is left X right; `right`
    is symmetric and carries the whole factor 1 / sqrt(base * power), so that `left` holds exact signs.
    """
    device = torch.device(device)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _made_factors(size, dtype, device)
    return _kept_factors(size, dtype, device)


def _made_factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = (torch.from_numpy(signs).to(device=device, dtype=dtype) for signs in _factor_signs(size))
    return left, right / math.sqrt(len(left) * len(right))


@lru_cache(maxsize=32)
def _kept_factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: no CUDA graph could hold the copy. Not inference tensors, whoever asks first."""
    with torch.inference_mode(False), torch.no_grad():
        return _made_factors(size, dtype, device)


def transform(x: Tensor) -> Tensor:
    """Rotate the last dimension: x H^T / sqrt(base * power), in two matrix products per block.

    Applied to activations it gives g' = H g; applied to the rows of a weight it gives W H^T, and W H^T g' = W g.

    Args:
        x: (..., size) floating point, any strides; computed in its own dtype, half precision in float32.

    Returns:
        (..., size) of x's dtype, contiguous.

    Raises:
        SizeError: size is 0.
    """
    return _turned(x, back=False)


def inverse(x: Tensor) -> Tensor:
    """Undo `transform`: x H / sqrt(base * power). Arguments, result and errors as there."""
    return _turned(x, back=True)


def _turned(x: Tensor, *, back: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    left, right = factors(x.shape[-1], dtype=dtype, device=x.device)
    blocks = x.to(dtype).reshape(-1, len(left), len(right))
    return torch.matmul(left.T if back else left, torch.matmul(blocks, right)).reshape(x.shape).to(x.dtype)
