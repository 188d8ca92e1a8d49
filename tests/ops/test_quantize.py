"""quantize and quantize_per_token: CPU against the reference, the reference against NumPy."""

import numpy as np
import pytest
import torch

from quamba import ops
from quamba.errors import QuambaError

from .helpers import Source, check_registration, clone, round_clip, wide

SHAPES = [(1,), (1, 1), (3, 17), (2, 5, 129), (2, 0, 16), (4, 151)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(op, args):
    actual = op(*clone(args))
    with ops.reference():
        return actual, op(*clone(args))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["tensor", "channel", "token"])
def test_quantize(shape, dtype, scale):
    source = Source()
    sizes = {"tensor": (), "channel": shape[-1:], "token": (*shape[:-1], 1)}[scale]
    args = [source.normal(*shape, dtype=dtype), source.scale(*sizes)]
    actual, expected = both(ops.quantize, args)
    assert torch.equal(actual, expected)
    quotient = (args[0].float() / args[1]).numpy()
    assert np.array_equal(actual.numpy(), round_clip(quotient))


def test_ties_go_to_even_and_ends_saturate():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, -128.5, -129.0, -1e30, 0.0])
    actual, expected = both(ops.quantize, [x, torch.tensor(1.0)])
    assert actual.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128, 0]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token(shape, dtype):
    x = Source().normal(*shape, dtype=dtype)
    (q, scale), (q_expected, scale_expected) = both(ops.quantize_per_token, [x])
    assert torch.equal(q, q_expected)
    assert torch.equal(scale, scale_expected)
    assert scale.dtype == torch.float32
    absmax = np.abs(wide(x)).max(-1, keepdims=True, initial=0)
    np.testing.assert_allclose(scale.numpy(), absmax / 127, rtol=1e-6)
    assert np.abs(q.numpy().astype(int)).max(initial=0) <= 127
    assert (np.abs(q.numpy().astype(int)).max(-1, initial=0) == 127).all() or not x.numel()
    assert (np.abs(q.numpy() * wide(scale) - wide(x)) <= wide(scale) * 0.50001).all()


def test_per_token_of_zeros():
    q, scale = ops.quantize_per_token(torch.zeros(3, 5))
    assert not q.any()
    assert (scale > 0).all()


def test_strides_and_untouched_input():
    x = Source().normal(4, 6, 48).transpose(0, 1)[..., ::2]
    before = x.clone()
    for op, args in ((ops.quantize, [x, torch.tensor(0.1)]), (ops.quantize_per_token, [x])):
        actual, expected = both(op, args)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        op(*args)
    assert torch.equal(x, before)


def test_wrong_arguments_raise():
    with pytest.raises(QuambaError, match=r"found x of dtype torch.int8"):
        ops.quantize(torch.zeros(3, 4, dtype=torch.int8), torch.tensor(1.0))
    with pytest.raises(QuambaError, match=r"found x of dtype torch.int32"):
        ops.quantize_per_token(torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(QuambaError, match=r"found scale of shape \(3,\); expected \(3, 1\)"):
        ops.quantize(torch.zeros(3, 4), torch.ones(3))
    with pytest.raises(QuambaError, match=r"found scale of dtype torch.float64; expected float32"):
        ops.quantize(torch.zeros(3, 4), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    x = Source().normal(3, 4, 24, dtype=dtype).transpose(0, 1)
    check_registration(ops.quantize, [x, torch.tensor(0.1)])
    check_registration(ops.quantize_per_token, [x])
