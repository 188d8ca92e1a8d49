"""Hadamard matrices against their definition in integers, and the fast transform against the explicit matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quamba import hadamard
from quamba.errors import QuambaError

DESIGN_SIZES = (192, 256, 384, 512, 768, 1536, 2048, 2560, 3072, 4096, 5120, 8192)
OTHER_SIZES = (1, 2, 3, 7, 12, 80, 151, 127 * 2, 384 + 2, 28 * 8, 36, 40, 52, 60, 92, 116 * 2, 244, 23 * 2)
BASES = [order for order in range(1, hadamard.MAX_BASE + 1) if hadamard._base(order) is not None]


def signs(size: int) -> np.ndarray:
    """The matrix of the transform times sqrt(block), as integer values."""
    _, power, base = hadamard.decompose(size)
    scaled = (hadamard.matrix(size) * (power * base) ** 0.5).numpy()
    rounded = np.rint(scaled)
    assert np.abs(scaled - rounded).max() < 1e-12
    return rounded  # float64: sums of so few +1 and -1 are exact integers, and BLAS is fast


@pytest.mark.parametrize("order", BASES)
def test_base_is_hadamard(order):
    h = hadamard.base_matrix(order).numpy().astype(np.int64)
    assert h.shape == (order, order)
    assert np.array_equal(np.abs(h), np.ones_like(h))
    assert np.array_equal(h @ h.T, order * np.eye(order, dtype=np.int64))


def test_expected_bases_exist():
    assert {1, 12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 92, 100, 108, 116, 124} <= set(BASES)
    # The first orders that neither Paley nor the two Williamson rows reach, nor doubling: 4 * 39 and 4 * 43.
    missing = [order for order in range(4, hadamard.MAX_BASE + 1, 4) if hadamard.decompose(order)[0] != 1]
    assert missing[:2] == [156, 172]


@pytest.mark.parametrize("size", [s for s in DESIGN_SIZES + OTHER_SIZES if s <= 1536])
def test_blocks_are_hadamard(size):
    blocks, power, base = hadamard.decompose(size)
    order = power * base
    h = signs(size)
    assert np.array_equal(h @ h.T, order * np.eye(size))
    mask = np.kron(np.eye(blocks), np.ones((order, order)))
    assert np.array_equal(np.abs(h), mask)


@pytest.mark.parametrize("size", DESIGN_SIZES)
def test_design_sizes_need_no_blocks(size):
    blocks, power, base = hadamard.decompose(size)
    assert blocks == 1
    assert power * base == size
    assert base == {3: 12, 5: 20, 1: 1}[size // (size & -size)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, (1, 1, 1)),
        (6, (3, 2, 1)),
        (7, (7, 1, 1)),
        (28, (1, 1, 28)),
        (36, (1, 1, 36)),
        (40, (1, 2, 20)),
        (80, (1, 4, 20)),
        (92, (1, 1, 92)),
        (254, (127, 2, 1)),
        (386, (193, 2, 1)),
        (4 * 47 * 3, (47, 1, 12)),
        (1536, (1, 128, 12)),
        (5120, (1, 256, 20)),
    ],
)
def test_decompose(size, expected):
    assert hadamard.decompose(size) == expected


def test_layout_power_part_is_fast():
    """H[i * 2^k + j, i' * 2^k + j'] = B[i, i'] (-1)^popcount(j & j')."""
    _, power, base = hadamard.decompose(96)
    b = hadamard.base_matrix(base).numpy()
    h = signs(96)
    for row in range(96):
        for column in range(96):
            sylvester = (-1) ** bin((row % power) & (column % power)).count("1")
            assert h[row, column] == b[row // power, column // power] * sylvester


@pytest.mark.parametrize("size", [0, -4])
def test_rejects_sizes_that_are_not_positive(size):
    with pytest.raises(QuambaError, match=f"found a size of {size}"):
        hadamard.decompose(size)
    with pytest.raises(ValueError, match="expected a positive one"):
        hadamard.matrix(size)


@pytest.mark.parametrize("order", [0, -1, 3, 40, 188, 512])
def test_rejects_orders_without_a_base(order):
    with pytest.raises(QuambaError, match=f"order {order}"):
        hadamard.base_matrix(order)


@given(st.integers(1, 700))
@settings(deadline=None, max_examples=25)
def test_any_size_is_orthonormal_and_the_fast_transform_agrees(size):
    h = signs(size)
    blocks, power, base = hadamard.decompose(size)
    assert blocks * power * base == size
    assert np.array_equal(h @ h.T, power * base * np.eye(size))
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(hadamard.transform(x), x @ hadamard.matrix(size).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2560, 5120, 8192])
def test_large_transform_against_definition(size):
    """Columns of the transform: H e_c, from the definition, without building the matrix."""
    _, power, base = hadamard.decompose(size)
    b = hadamard.base_matrix(base).numpy()
    columns = [0, 1, size // 3, size - 1]
    x = torch.zeros(len(columns), size, dtype=torch.float64)
    x[range(len(columns)), columns] = 1
    rows = np.arange(size)
    for got, column in zip(hadamard.transform(x).numpy(), columns, strict=True):
        parity = np.array([bin(v).count("1") % 2 for v in (rows % power) & (column % power)])
        expected = b[rows // power, column // power] * (1 - 2 * parity) / np.sqrt(size)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_transform_keeps_dtype_and_shape_of_strided_input(dtype):
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0)).to(dtype)[..., ::2]
    out = hadamard.transform(x)
    assert out.dtype == dtype
    assert out.shape == x.shape
    expected = x.to(torch.float64) @ hadamard.matrix(24).T
    torch.testing.assert_close(out.to(torch.float64), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_weight_and_activation_rotations_cancel():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 1536, dtype=torch.float64, generator=generator)
    g = torch.randn(7, 1536, dtype=torch.float64, generator=generator)
    rotated = hadamard.transform(g) @ hadamard.transform(weight).T
    torch.testing.assert_close(rotated, g @ weight.T, rtol=0, atol=1e-10)


def test_matrices_are_not_shared_between_callers():
    hadamard.base_matrix(12).zero_()
    hadamard.matrix(12).zero_()
    assert int(hadamard.base_matrix(12).abs().sum()) == 144
    with torch.inference_mode():
        built_inside = hadamard.matrix(24, dtype=torch.float32, device="cpu")
    assert built_inside.shape == (24, 24)
