import pytest
import torch

from quamba.ops import hadamard, hadamard_quant
from tests.cuda.compare import FLOATS, check, randn, scales, sliced, strided

SIZES = [1, 2, 3, 4, 7, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 52, 60, 64, 96, 100, 160, 520, 1536, 2048, 3072, 3584]
SIZES += [4096, 4608, 5120, 5376, 6720, 8192, 8960, 14336, 16384]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sizes(size: int, dtype: torch.dtype) -> None:
    x = randn(3, size, dtype=dtype)
    check(hadamard, x, error=8.0)
    check(hadamard_quant, x, scales(), flips=2e-4)
    check(hadamard_quant, x, scales(size), flips=2e-4)


@pytest.mark.parametrize("view", [strided, sliced, lambda x: x.transpose(0, 1)])
@pytest.mark.parametrize("size", [80, 96, 128])
def test_strides(view, size: int) -> None:
    x = view(randn(6, 4, size, dtype=torch.bfloat16))
    check(hadamard, x, error=8.0)
    check(hadamard_quant, x, scales(size), flips=1e-3)


def test_basis() -> None:
    """Unit vectors show the matrix itself."""
    for size in (240, 256):
        check(hadamard, torch.eye(size, device="cuda"), error=2.0)


def test_large_values() -> None:
    x = randn(5, 1536, dtype=torch.float16, scale=2e4).clamp(-65504, 65504)
    check(hadamard_quant, x, torch.tensor(300.0, device="cuda"), flips=2e-4)


@pytest.mark.parametrize("size", [1536, 2048, 3072, 4096, 5120, 8192])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_rows(size: int, dtype: torch.dtype) -> None:
    """The kernel for many rows gives the same bytes as the one for few: odd counts, several rows a block, strides."""
    x = randn(2751, 2 * size, dtype=dtype)
    x[5, 3], x[600, 7], x[700, 11] = float("inf"), float("nan"), torch.finfo(dtype).max
    for view in (x[:, :size], x[1:1101, size:], x[: 2 * 1061].view(1061, -1)[:, :size]):
        for scale in (scales(), scales(size)):
            few = [hadamard_quant(rows, scale) for rows in view.split(100)]
            assert torch.equal(hadamard_quant(view, scale), torch.cat(few))
    check(hadamard_quant, x[:1100, :size].nan_to_num(0.0, 1.0, -1.0).clamp(-4, 4), scales(size), flips=2e-4)


@pytest.mark.parametrize("rows", [20, 1100])
@pytest.mark.parametrize("size", [1536, 5120])
def test_not_a_number(rows: int, size: int) -> None:
    """Zero, as on the CPU; and its row alone."""
    x, scale = randn(rows, size, dtype=torch.float16), torch.tensor(0.02, device="cuda")
    expected = hadamard_quant(x, scale)
    x[7, 5], expected[7] = float("nan"), 0
    assert torch.equal(hadamard_quant(x, scale), expected)
    assert not hadamard_quant(x[:8].cpu(), scale.cpu())[7].any()
