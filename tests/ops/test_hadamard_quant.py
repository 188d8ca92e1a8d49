"""hadamard and hadamard_quant: CPU against the reference, the reference against the matrix in float64."""

import pytest
import torch

from quamba import hadamard, ops
from quamba.errors import QuambaError

from .helpers import Source, assert_close, check_registration, round_clip, run_both, wide

SHAPES = [(1,), (1, 7), (1, 512), (3, 17), (2, 3, 80), (5, 129), (3, 254), (2, 0, 24), (9, 768), (1, 1536), (4, 2560)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hadamard(shape, dtype):
    x = Source().normal(*shape).to(dtype)
    out = run_both(ops.hadamard, [x])
    with ops.reference():
        exact = wide(x) @ hadamard.matrix(shape[-1]).numpy().T
        assert_close(ops.hadamard(x), exact)
    assert_close(out, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["tensor", "channel"])
def test_hadamard_quant(shape, dtype, scale):
    source = Source()
    args = [source.normal(*shape, dtype=dtype), source.scale(*([shape[-1]] if scale == "channel" else []))]
    run_both(ops.hadamard_quant, args)
    with ops.reference():
        out = ops.hadamard_quant(*args)
    assert_close(out, round_clip(wide(args[0]) @ hadamard.matrix(shape[-1]).numpy().T / wide(args[1])))


def test_an_outlier_is_spread():
    x = torch.zeros(1, 1536)
    x[0, 5] = 1000.0
    out = ops.hadamard(x)
    torch.testing.assert_close(out.abs(), torch.full_like(out, 1000 / 1536**0.5))


def test_strides_and_untouched_input():
    x = Source().normal(4, 6, 48).transpose(0, 1)[..., ::2]
    before = x.clone()
    run_both(ops.hadamard, [x])
    run_both(ops.hadamard_quant, [x, torch.tensor(0.1)])
    assert torch.equal(x, before)
    ones = torch.ones(2, 1)
    assert ops.hadamard(ones).data_ptr() != ones.data_ptr()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_saturation_and_zeros(scale):
    args = [Source().normal(5, 64), torch.tensor(scale)]
    out = run_both(ops.hadamard_quant, args)
    assert set(out.unique().tolist()) == ({-128, 127} if scale < 1 else {0})
    assert not ops.hadamard_quant(torch.zeros(3, 60), torch.tensor(scale)).any()


def test_under_inference_mode_first():
    """The cached factors must serve outside inference mode too."""
    with torch.inference_mode():
        inside = ops.hadamard(torch.ones(2, 44))
    x = torch.ones(2, 44)
    assert torch.equal(ops.hadamard(x), inside)


def test_wrong_arguments_raise():
    with pytest.raises(QuambaError, match=r"found x of dtype torch.int8"):
        ops.hadamard(torch.zeros(3, 4, dtype=torch.int8))
    with pytest.raises(QuambaError, match=r"found scale of shape \(3,\); expected \(\) or \(4,\)"):
        ops.hadamard_quant(torch.zeros(3, 4), torch.ones(3))
    with pytest.raises(QuambaError, match="found a size of 0"):
        ops.hadamard(torch.zeros(3, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    x = Source().normal(3, 4, 24, dtype=dtype).transpose(0, 1)
    check_registration(ops.hadamard, [x])
    check_registration(ops.hadamard_quant, [x, torch.tensor(0.1)])
