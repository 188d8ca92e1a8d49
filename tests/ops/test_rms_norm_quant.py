"""rms_norm_quant: CPU against the reference, the reference against NumPy."""

import numpy as np
import pytest
import torch

from quamba import ops
from quamba.errors import QuambaError

from .helpers import Source, assert_close, check_registration, round_clip, run_both, wide


def arguments(shape=(3, 17), *, dtype=torch.float32, weight=torch.float32, scale="tensor", eps=1e-5, seed=0):
    source = Source(seed)
    size = shape[-1]
    return [
        3 * source.normal(*shape, dtype=dtype),
        None if weight is None else source.normal(size, dtype=weight),
        source.scale(*([size] if scale == "channel" else [])),
        eps,
    ]


def definition(x, weight, scale, eps):
    x = wide(x)
    out = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return round_clip((out if weight is None else out * wide(weight)) / wide(scale))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 17), (1, 256), (2, 5, 129), (2, 0, 16), (4, 151)])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"weight": None},
        {"scale": "channel"},
        {"dtype": torch.bfloat16, "weight": torch.bfloat16},
        {"dtype": torch.float16, "scale": "channel"},
        {"eps": 0.5},
    ],
)
def test_against_reference_and_definition(shape, variant):
    args = arguments(shape, **variant)
    run_both(ops.rms_norm_quant, args)
    with ops.reference():
        assert_close(ops.rms_norm_quant(*args), definition(*args))


@pytest.mark.parametrize("magnitude", [0.0, 1e-12, 1e4])
def test_magnitudes(magnitude):
    args = arguments((5, 64))
    args[0].mul_(magnitude)
    out = run_both(ops.rms_norm_quant, args)
    assert_close(out, definition(*args))
    assert bool(out.any()) == (magnitude == 1e4)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_saturation(scale):
    args = arguments((5, 64))
    args[2] = torch.tensor(scale)
    assert set(run_both(ops.rms_norm_quant, args).unique().tolist()) == ({-128, 127} if scale < 1 else {0})


def test_strides_and_untouched_input():
    args = arguments((4, 6, 34))
    args[0] = args[0].transpose(0, 1)[..., ::2]
    args[1], before = args[1][::2], args[0].clone()
    run_both(ops.rms_norm_quant, args)
    ops.rms_norm_quant(*args)
    assert torch.equal(args[0], before)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(3, 17, dtype=torch.int8), "found x of dtype torch.int8"),
        (1, torch.zeros(16), r"found weight of shape \(16,\); expected \(17,\)"),
        (2, torch.ones(3, 1), r"found scale of shape \(3, 1\); expected \(\) or \(17,\)"),
        (2, torch.ones((), dtype=torch.float16), "found scale of dtype torch.float16; expected float32"),
    ],
)
def test_wrong_arguments_raise(position, value, words):
    args = arguments()
    args[position] = value
    with pytest.raises(QuambaError, match=words):
        ops.rms_norm_quant(*args)


@pytest.mark.parametrize("variant", [{}, {"weight": None, "dtype": torch.bfloat16, "scale": "channel"}])
def test_registration(variant):
    check_registration(ops.rms_norm_quant, arguments(**variant))
