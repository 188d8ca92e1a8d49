"""selective_scan and its step: CPU against the reference, both against a float64 recurrence, states and splits."""

import numpy as np
import pytest
import torch

from quamba import ops
from quamba.errors import QuambaError
from quamba.ops.cpu import selective_scan as cpu

from .helpers import Source, assert_close, check_registration, clone, round_clip, run_both, wide

SIZES = [(1, 1, 1, 1), (2, 3, 5, 3), (1, 17, 129, 16), (3, 129, 7, 1), (2, 151, 33, 17), (5, 40, 300, 16)]


def arguments(
    b=2,
    length=17,
    d=5,
    n=3,
    *,
    dtype=torch.int8,
    scales="tensor",
    vectors=torch.float32,
    gate=True,
    out=None,
    out_dtype=torch.float32,
    state=True,
    seed=0,
):
    source = Source(seed)

    def scale(size):
        if scales is None:
            return None
        around = 0.02 if dtype is torch.int8 else 1.5
        return source.scale(*([size] if scales == "channel" else []), around=around)

    # x and z are halves of one tensor, B and C pieces of another, as W_in and W_x return them.
    xz = source.tensor(dtype, b, length, 2 * d)
    dbc = source.tensor(dtype, b, length, 2 + 2 * n)
    out_scale = {None: None, "tensor": source.scale(around=0.05), "channel": source.scale(d, around=0.05)}[out]
    return [
        xz[..., :d],
        scale(d),
        source.tensor(dtype, b, length, d),
        scale(d),
        source.normal(d, dtype=vectors) - 2,
        -torch.exp(source.normal(d, n)),
        dbc[..., 2 : 2 + n],
        scale(n),
        dbc[..., 2 + n :],
        scale(n),
        source.normal(d, dtype=vectors),
        xz[..., d:] if gate else None,
        scale(d) if gate else None,
        out_scale,
        torch.int8 if out else out_dtype,
        source.normal(b, d, n) if state else None,
    ]


def definition(
    x, x_scale, dt, dt_scale, dt_bias, A, B, B_scale, C, C_scale, D, z, z_scale, out_scale, out_dtype, state
):
    """The recurrence, token by token in float64; also the final state."""
    x, dt, B, C, z = (
        None if value is None else wide(value) * (1 if scale is None else wide(scale))
        for value, scale in ((x, x_scale), (dt, dt_scale), (B, B_scale), (C, C_scale), (z, z_scale))
    )
    dt = np.logaddexp(0, dt + wide(dt_bias))
    s = np.zeros((x.shape[0], *A.shape)) if state is None else wide(state).copy()
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        s = np.exp(dt[:, t, :, None] * wide(A)) * s + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y[:, t] = (s * C[:, t, None]).sum(-1) + wide(D) * x[:, t]
    if z is not None:
        y = y * z / (1 + np.exp(-z))
    return y if out_scale is None else round_clip(y / wide(out_scale)), s


VARIANTS = [
    {},
    {"scales": "channel", "out": "channel"},
    {"out": "tensor"},
    {"out_dtype": torch.bfloat16, "vectors": torch.bfloat16},
    {"out_dtype": torch.float16, "vectors": torch.float16},
    {"gate": False},
    {"state": False},
    {"gate": False, "state": False, "out": "channel"},
    {"dtype": torch.float32, "scales": None},
    {"dtype": torch.float32, "scales": "channel"},
    {"dtype": torch.bfloat16, "scales": None, "out_dtype": torch.bfloat16},
    {"dtype": torch.float16, "scales": "tensor", "out": "tensor"},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_reference_and_definition(size, variant):
    args = arguments(*size, **variant)
    run_both(ops.selective_scan, args, mutated=15)
    copies = clone(args)
    with ops.reference():
        out = ops.selective_scan(*copies)
    expected, state = definition(*args)
    assert_close(out, expected)
    if args[15] is not None:
        assert_close(copies[15], state)


@pytest.mark.parametrize("size", [(1, 300, 64, 16), (3, 200, 33, 5), (2, 37, 130, 16)])
@pytest.mark.parametrize(
    "blocks", [(1 << 15, 1 << 18), (1 << 9, 1 << 11), (1 << 6, 1 << 12), (1 << 12, 1 << 12), (1, 1)]
)
def test_every_way_of_cutting_is_as_good_as_the_reference(monkeypatch, size, blocks):
    """Chunks, segments, and blocks of rows and channels, full and partial: errors as small as the reference's."""
    monkeypatch.setattr(cpu, "_STEP", blocks[0])
    monkeypatch.setattr(cpu, "_BUFFER", blocks[1])
    args = arguments(*size)
    first, second = clone(args), clone(args)
    expected, state = definition(*args)
    actual = ops.selective_scan(*first)
    with ops.reference():
        reference = ops.selective_scan(*second)
    for found, plain, exact in ((actual, reference, expected), (first[15], second[15], state)):
        worst = np.abs(plain.numpy() - exact).max()
        assert np.abs(found.numpy() - exact).max() <= 3 * worst + 1e-6 * np.abs(exact).max()


def test_long_memory():
    """A near zero: nothing decays, and the carry over all chunks counts."""
    args = arguments(1, 700, 9, 4, dtype=torch.float32, scales=None, gate=False)
    args[5] = torch.full((9, 4), -1e-4)
    args[4] = torch.full((9,), -4.0)
    run_both(ops.selective_scan, args, mutated=15)
    assert_close(ops.selective_scan(*clone(args)), definition(*args)[0])


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_extreme_steps(shift):
    """dt of nearly zero keeps the state; a large one forgets it at once, through exponentials that underflow."""
    args = arguments(2, 40, 5, 3)
    args[4] = torch.full((5,), shift)
    run_both(ops.selective_scan, args, mutated=15)
    assert_close(ops.selective_scan(*clone(args)), definition(*args)[0])
    run_both(ops.selective_scan_step, step_arguments(args, 0), mutated=15)


def step_arguments(args, t, state=None):
    sliced = [a[:, t] if i in (0, 2, 6, 8, 11) and a is not None else a for i, a in enumerate(args)]
    sliced[15] = args[15] if state is None else state
    return sliced


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("state", True)])
def test_step_against_reference(size, variant):
    args = arguments(*size, **variant)
    run_both(ops.selective_scan_step, step_arguments(args, -1), mutated=15)


def dt_step_arguments(b, d, n, rank, *, dt_scale, seed=0, **variant):
    """What selective_scan_dt_step takes: the step's, with a product for dt. d is a piece of wider rows."""
    source = Source(seed + 100)
    x, x_scale, _, _, *rest = step_arguments(arguments(b, 3, d, n, seed=seed, **variant), 1)
    scale = {None: None, "tensor": source.scale(around=0.05), "channel": source.scale(d, around=0.05)}[dt_scale]
    product = [source.int8(b, rank + 6)[:, :rank], source.scale(), source.int8(d, rank), source.scale(d, around=0.01)]
    return [x, x_scale, *product, scale, *rest]


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (3, 5, 3, 7), (2, 129, 16, 48), (9, 33, 17, 160)])
@pytest.mark.parametrize("dt_scale", [None, "tensor", "channel"])
@pytest.mark.parametrize("variant", [{}, {"out": "channel", "scales": "channel"}, {"dtype": torch.float32}])
def test_dt_step(size, dt_scale, variant):
    args = dt_step_arguments(*size, dt_scale=dt_scale, **variant)
    actual = run_both(ops.selective_scan_dt_step, args, mutated=18)
    # The product in integers, and its rounding, by other means.
    d, weight = args[2].to(torch.int64), args[4].to(torch.int64)
    dt = (d @ weight.T).to(torch.float32) * (args[3] * args[5])
    if dt_scale is not None:
        dt = torch.from_numpy(round_clip(wide(dt / args[6]))).to(torch.int8)
    step = [args[0], args[1], dt, args[6], *clone(args)[7:]]
    assert_close(actual, ops.selective_scan_step(*step))


def test_dt_step_registration():
    check_registration(ops.selective_scan_dt_step, dt_step_arguments(2, 5, 3, 7, dt_scale="channel"))


@pytest.mark.parametrize("length", [1, 2, 33, 129])
def test_prefill_equals_steps_and_split_prefill(length):
    whole = arguments(2, length, 33, 16)
    steps, split = clone(whole), clone(whole)
    expected = ops.selective_scan(*whole)
    rows = [ops.selective_scan_step(*step_arguments(steps, t)) for t in range(length)]
    assert_close(torch.stack(rows, dim=1), expected)
    assert_close(steps[15], whole[15])
    at = length // 3
    parts = []
    for part in (slice(0, at), slice(at, length)):
        parts.append(ops.selective_scan(*step_arguments(split, part)))
    assert_close(torch.cat(parts, dim=1), expected)
    assert_close(split[15], whole[15])


def test_state_with_other_strides():
    args = arguments(2, 20, 33, 16)
    args[15] = args[15].transpose(1, 2).contiguous().transpose(1, 2)
    run_both(ops.selective_scan, args, mutated=15)
    run_both(ops.selective_scan_step, step_arguments(args, 0), mutated=15)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_inputs_are_not_written(dtype):
    args = arguments(2, 20, 5, 3, dtype=dtype, scales="channel")
    before = clone(args)
    ops.selective_scan(*args)
    ops.selective_scan_step(*step_arguments(args, 1))
    for position in (0, 2, 4, 5, 6, 8, 10, 11):
        assert torch.equal(args[position], before[position])


@pytest.mark.parametrize("out_scale", [1e-12, 1e12])
def test_saturation_and_zeros(out_scale):
    args = arguments(2, 9, 5, out="tensor")
    args[13] = torch.tensor(out_scale)
    out = run_both(ops.selective_scan, args, mutated=15)
    assert set(out.unique().tolist()) <= ({-128, 0, 127} if out_scale < 1 else {0})
    args[0].zero_(), args[15].zero_()
    assert not ops.selective_scan(*args).any()
    assert not args[15].any()


def test_empty_sequence_keeps_the_state():
    args = step_arguments(arguments(2, 5, 5, 3), slice(0, 0))
    assert run_both(ops.selective_scan, args, mutated=15).shape == (2, 0, 5)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, 17, 5, dtype=torch.int32), "found x of dtype torch.int32"),
        (0, torch.zeros(2, 17, 4, dtype=torch.int8), r"found x of shape \(2, 17, 4\); expected \(2, 17, 5\)"),
        (1, torch.ones(4), r"found x_scale of shape \(4,\); expected \(\) or \(5,\)"),
        (2, torch.zeros(2, 16, 5, dtype=torch.int8), r"found dt of shape \(2, 16, 5\); expected \(2, 17, 5\)"),
        (4, torch.zeros(4), r"found dt_bias of shape \(4,\); expected \(5,\)"),
        (5, torch.zeros(5, 3, dtype=torch.float64), "found A of dtype torch.float64; expected float32"),
        (5, torch.zeros(5), "found A of shape"),
        (6, torch.zeros(2, 17, 5, dtype=torch.int8), r"found B of shape \(2, 17, 5\); expected \(2, 17, 3\)"),
        (9, torch.ones(5), r"found C_scale of shape \(5,\); expected \(\) or \(3,\)"),
        (10, torch.zeros(5, dtype=torch.int8), "found D of dtype torch.int8"),
        (11, torch.zeros(2, 17, 4), "found z of shape"),
        (13, torch.ones(2), "found out_scale of shape|found out_dtype"),
        (14, torch.int8, "found out_dtype torch.int8 with no out_scale"),
        (15, torch.zeros(2, 5, 3, dtype=torch.bfloat16), "found state of dtype torch.bfloat16; expected float32"),
        (15, torch.zeros(1, 5, 3), r"found state of shape \(1, 5, 3\); expected \(2, 5, 3\)"),
    ],
)
def test_wrong_arguments_raise(position, value, words):
    args = arguments()
    args[position] = value
    with pytest.raises(QuambaError, match=words):
        ops.selective_scan(*args)
    step = step_arguments(args, 0)
    if position == 2:
        return  # one token of a sequence of another length is a valid token
    with pytest.raises(QuambaError, match=words.replace(", 17", "").replace(", 16", "")):
        ops.selective_scan_step(*step)


@pytest.mark.parametrize("variant", [{}, {"out": "channel", "scales": "channel"}, {"state": False, "gate": False}])
def test_registration(variant):
    args = arguments(**variant)
    check_registration(ops.selective_scan, args)
    if args[15] is not None:
        check_registration(ops.selective_scan_step, step_arguments(args, 0))
