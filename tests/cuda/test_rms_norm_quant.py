import pytest
import torch

from quamba.ops import rms_norm_quant
from tests.cuda.compare import FLOATS, check, randn, scales, sliced, strided


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 768), (129, 1000), (4, 2560), (1, 8192)])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("weight", [None, *FLOATS])
def test_rms_norm_quant(dtype, shape, channel, weight) -> None:
    gamma = None if weight is None else randn(shape[-1], dtype=weight)
    scale = scales(shape[-1]) if channel else scales()
    check(rms_norm_quant, randn(*shape, dtype=dtype, scale=3.0), gamma, scale, 1e-5, flips=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [8, 136, 768, 2560, 4104, 8192, 8200])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("weight", [None, *FLOATS])
def test_many_rows(dtype, columns, channel, weight) -> None:
    gamma = None if weight is None else randn(columns, dtype=weight)
    scale = scales(columns) if channel else scales()
    check(rms_norm_quant, randn(2, 301, columns, dtype=dtype, scale=3.0), gamma, scale, 0.3, flips=1e-4)


@pytest.mark.parametrize("view", [strided, sliced, lambda x: x.transpose(0, 1)])
def test_strides_of_many_rows(view) -> None:
    x = randn(700, 3, 200, dtype=torch.float16)
    check(rms_norm_quant, view(x), randn(201)[1:], scales(200), 1e-6, flips=1e-4)
    check(rms_norm_quant, view(x), randn(200), scales(201)[1:], 1e-6, flips=1e-4)


def test_eps() -> None:
    check(rms_norm_quant, randn(4, 96, scale=0.1), None, scales(), 0.3, flips=1e-3)


@pytest.mark.parametrize("view", [strided, sliced, lambda x: x.transpose(0, 1)])
def test_strides(view) -> None:
    check(rms_norm_quant, view(randn(6, 4, 72, dtype=torch.float16)), randn(72), scales(72), 1e-6, flips=1e-3)
