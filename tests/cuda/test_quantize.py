import pytest
import torch

from quamba.ops import quantize, quantize_per_token
from tests.cuda.compare import FLOATS, check, randn, scales, sliced, strided


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 768), (129, 1000), (4, 2560)])
@pytest.mark.parametrize("form", ["tensor", "channel", "token"])
def test_quantize(dtype: torch.dtype, shape: tuple[int, ...], form: str) -> None:
    scale = {"tensor": scales(), "channel": scales(shape[-1]), "token": scales(*shape[:-1], 1)}[form]
    check(quantize, randn(*shape, dtype=dtype), scale)


@pytest.mark.parametrize("view", [strided, sliced, lambda x: x.transpose(0, 1)])
def test_quantize_strides(view) -> None:
    check(quantize, view(randn(6, 4, 72, dtype=torch.float16)), scales(72))


def test_quantize_extremes() -> None:
    x = torch.tensor([0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, 1e30, -1e30, 1e-40, float("inf")])
    check(quantize, x.cuda(), torch.tensor(1.0, device="cuda"))
    check(quantize, -x.cuda(), torch.tensor(1e-8 / 127, device="cuda"))
    check(quantize, x.cuda(), torch.tensor(3e4, device="cuda"))


def test_quantize_every_half() -> None:
    bits = torch.arange(65536, device="cuda", dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16)
    check(quantize, x[~x.isnan()], torch.tensor(0.0137, device="cuda"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 768), (129, 1000), (4, 5120)])
def test_quantize_per_token(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = randn(*shape, dtype=dtype)
    # torch divides by the constant 127 as a multiplication on CUDA: scales differ in the last place.
    check(quantize_per_token, x, flips=2e-4)
    check(quantize_per_token, strided(x), flips=2e-4)
    check(quantize_per_token, torch.zeros_like(x))


def test_empty() -> None:
    check(quantize, randn(0, 8), scales())
    check(quantize_per_token, randn(0, 8))
