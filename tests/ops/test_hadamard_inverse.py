"""hadamard_inverse undoes hadamard, for symmetric and unsymmetric base matrices."""

import pytest
import torch

from quamba import hadamard, ops


@pytest.mark.parametrize("size", [1, 7, 12, 20, 64, 192, 384, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_undoes_the_transform(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, size, dtype=torch.float64)
    turned = (x @ hadamard.matrix(size).T).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for inverse in (ops.hadamard_inverse, ops.OPS["hadamard_inverse"].reference):
        back = inverse(turned)
        assert back.dtype == dtype
        torch.testing.assert_close(back.double(), x, rtol=0, atol=tolerance)


def test_strided_input_and_opcheck() -> None:
    wide = torch.randn(4, 9, 48)
    x = wide[..., 3:27]
    torch.testing.assert_close(ops.hadamard_inverse(x), ops.hadamard_inverse(x.contiguous()))
    torch.library.opcheck(torch.ops.quamba.hadamard_inverse.default, (x,))
