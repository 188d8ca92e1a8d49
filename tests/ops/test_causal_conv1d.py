"""causal_conv1d and its step: CPU against the reference, the reference against a loop, states and masks."""

import numpy as np
import pytest
import torch

from quamba import ops
from quamba.errors import QuambaError

from .helpers import Source, assert_close, check_registration, clone, round_clip, run_both, wide

SIZES = [(1, 1, 1, 4), (2, 3, 5, 4), (1, 17, 129, 4), (3, 129, 7, 2), (2, 151, 33, 3), (1, 8, 16, 1), (1, 2, 6, 7)]


def arguments(
    b=2,
    length=17,
    d=5,
    k=4,
    *,
    dtype=torch.int8,
    weight=torch.int8,
    bias=torch.float32,
    x_scale="tensor",
    weight_scale="channel",
    out="channel",
    out_dtype=torch.float32,
    mask=None,
    state=True,
    seed=0,
):
    source = Source(seed)

    def scale(kind, around):
        return None if kind is None else source.scale(*([d] if kind == "channel" else []), around=around)

    # A slice of a wider tensor, like the x half of W_in's output.
    x = source.tensor(dtype, b, length, 2 * d)[..., :d]
    out_scale = scale(out, 0.02)
    return [
        x,
        scale(x_scale, 0.03),
        source.tensor(weight, d, k),
        scale(weight_scale, 0.01),
        None if bias is None else source.normal(d, dtype=bias),
        out_scale,
        torch.int8 if out else out_dtype,
        mask,
        source.tensor(dtype, b, d, k) if state else None,
    ]


def definition(x, x_scale, weight, weight_scale, bias, out_scale, out_dtype, mask, conv_state):
    """One loop over time and taps in float64; also the new conv_state."""
    inputs, taps = wide(x), wide(weight)
    batch, length, channels = inputs.shape
    width = taps.shape[1]
    keep = np.ones((batch, length, 1)) if mask is None else (wide(mask) != 0).astype(float)[..., None]
    past = np.zeros((batch, width, channels)) if conv_state is None else wide(conv_state).swapaxes(1, 2)
    history = np.concatenate([past, inputs * keep], axis=1)
    out = np.zeros((batch, length, channels))
    for t in range(length):
        for k in range(width):
            out[:, t] += taps[:, k] * history[:, 1 + t + k]
    for scale in (x_scale, weight_scale):
        out = out if scale is None else out * wide(scale)
    out = out if bias is None else out + wide(bias)
    out = out / (1 + np.exp(-out)) * keep
    return out if out_scale is None else round_clip(out / wide(out_scale)), history[:, length:].swapaxes(1, 2)


VARIANTS = [
    {},
    {"out": "tensor", "x_scale": "channel"},
    {"weight_scale": "tensor", "bias": torch.bfloat16},
    {"bias": None, "state": False},
    {"out": None},
    {"out": None, "out_dtype": torch.bfloat16, "x_scale": "channel"},
    {"out": None, "out_dtype": torch.float16, "bias": torch.float16},
    {"dtype": torch.float32, "x_scale": None},
    {"dtype": torch.bfloat16, "x_scale": None, "weight": torch.bfloat16, "weight_scale": None, "out": None},
    {"dtype": torch.float16, "weight": torch.float32, "weight_scale": None},
    {"dtype": torch.float32, "weight": torch.float32, "x_scale": None, "weight_scale": None, "out": None},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_reference_and_definition(size, variant):
    args = arguments(*size, **variant)
    run_both(ops.causal_conv1d, args, mutated=8)
    copies = clone(args)
    with ops.reference():
        out = ops.causal_conv1d(*copies)
    expected, state = definition(*args)
    assert_close(out, expected)
    if args[8] is not None:
        assert np.array_equal(wide(copies[8]), state)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("variant", [{}, {"out": None}, {"dtype": torch.float32, "x_scale": None, "state": False}])
def test_mask(dtype, variant):
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, :9] = False
    args = arguments(3, 9, 5, mask=mask.to(dtype), **variant)
    out = run_both(ops.causal_conv1d, args, mutated=8)
    assert not out[0, :4].any()
    assert not out[1].any()
    assert_close(out, definition(*args)[0])


@pytest.mark.parametrize("variant", [{}, {"dtype": torch.float32, "x_scale": None, "out": None}])
def test_left_padding_equals_no_padding(variant):
    args = arguments(1, 11, 5, state=True, **variant)
    args[8].zero_()
    padded = clone(args)
    junk = Source(7).tensor(args[0].dtype, 1, 4, 5)
    padded[0] = torch.cat([junk, args[0]], dim=1)
    padded[7] = torch.tensor([[0] * 4 + [1] * 11])
    plain, shifted = ops.causal_conv1d(*args), ops.causal_conv1d(*padded)
    assert_close(shifted[:, 4:], plain, share=0)
    assert not shifted[:, :4].any()
    assert torch.equal(args[8], padded[8])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_prefill_equals_steps_and_split_prefill(length, k):
    whole = arguments(2, length, 33, k)
    steps, split = clone(whole), clone(whole)
    expected = ops.causal_conv1d(*whole)
    rows = [ops.causal_conv1d_step(steps[0][:, t], *steps[1:7], steps[8]) for t in range(length)]
    assert torch.equal(torch.stack(rows, dim=1), expected)
    assert torch.equal(steps[8], whole[8])
    at = length // 2
    parts = [ops.causal_conv1d(split[0][:, part], *split[1:]) for part in (slice(0, at), slice(at, length))]
    assert torch.equal(torch.cat(parts, dim=1), expected)
    assert torch.equal(split[8], whole[8])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("state", True)])
def test_step_against_reference(size, variant):
    args = arguments(*size, **variant)
    run_both(ops.causal_conv1d_step, [args[0][:, -1], *args[1:7], args[8]], mutated=7)


def test_state_with_other_strides():
    args = arguments(2, 3, 5)
    args[8] = args[8].transpose(1, 2).contiguous().transpose(1, 2)
    run_both(ops.causal_conv1d, args, mutated=8)
    run_both(ops.causal_conv1d_step, [args[0][:, -1], *args[1:7], args[8]], mutated=7)


@pytest.mark.parametrize("out_scale", [1e-10, 1e10])
def test_saturation_and_zeros(out_scale):
    args = arguments(2, 9, 5, out="tensor")
    args[5] = torch.tensor(out_scale)
    out = run_both(ops.causal_conv1d, args, mutated=8)
    # SiLU is bounded below: only the positive side saturates at its own limit, the negative one at -128 as well.
    assert set(out.unique().tolist()) <= ({-128, 0, 127} if out_scale < 1 else {0})
    args[0].zero_(), args[8].zero_(), args[4].zero_()
    assert not ops.causal_conv1d(*args).any()


@pytest.mark.parametrize("value", [-128, 127])
def test_extreme_inputs(value):
    args = arguments(1, 9, 5, out=None)
    args[0].fill_(value), args[8].fill_(value), args[2].fill_(value)
    run_both(ops.causal_conv1d, args, mutated=8)
    assert_close(ops.causal_conv1d(*clone(args)), definition(*args)[0])


def test_empty_sequence_keeps_the_state():
    args = arguments(2, 5, 5)
    args[0] = args[0][:, :0]
    assert run_both(ops.causal_conv1d, args, mutated=8).shape == (2, 0, 5)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, 5, dtype=torch.int8), r"found x of shape \(2, 5\); expected 3 dimensions"),
        (0, torch.zeros(2, 17, 5, dtype=torch.int32), "found x of dtype torch.int32"),
        (1, torch.ones(4), r"found x_scale of shape \(4,\); expected \(\) or \(5,\)"),
        (2, torch.zeros(5, dtype=torch.int8), r"found weight of shape \(5,\); expected 2 dimensions"),
        (2, torch.zeros(4, 4, dtype=torch.int8), r"found weight_scale of shape \(5,\); expected \(\) or \(4,\)"),
        (2, torch.zeros(5, 3, dtype=torch.int8), r"found conv_state of shape \(2, 5, 4\); expected \(2, 5, 3\)"),
        (3, torch.ones(4), "found weight_scale of shape"),
        (4, torch.ones(4), "found bias of shape"),
        (5, torch.ones(5, dtype=torch.float64), "found out_scale of dtype torch.float64; expected float32"),
        (6, torch.float32, "found out_dtype torch.float32 with an out_scale"),
        (7, torch.ones(2, 16), r"found mask of shape \(2, 16\); expected \(2, 17\)"),
        (8, torch.zeros(2, 5, 3, dtype=torch.int8), r"found conv_state of shape \(2, 5, 3\); expected \(2, 5, 4\)"),
        (8, torch.zeros(2, 5, 4), "found conv_state of dtype torch.float32; expected int8"),
    ],
)
def test_wrong_arguments_raise(position, value, words):
    args = arguments()
    args[position] = value
    with pytest.raises(QuambaError, match=words):
        ops.causal_conv1d(*args)
    if position not in (0, 7):
        with pytest.raises(QuambaError, match=words):
            ops.causal_conv1d_step(args[0][:, 0], *args[1:7], args[8])


@pytest.mark.parametrize(
    "variant", [{}, {"out": None, "out_dtype": torch.bfloat16, "mask": torch.ones(2, 17)}, {"state": False}]
)
def test_registration(variant):
    args = arguments(**variant)
    check_registration(ops.causal_conv1d, args)
    if args[8] is not None:
        check_registration(ops.causal_conv1d_step, [args[0][:, 0], *args[1:7], args[8]])
