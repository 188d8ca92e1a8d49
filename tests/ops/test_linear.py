"""linear: the CPU implementation against the reference, the reference against integers, and the caches."""

import copy
import gc
import itertools

import numpy as np
import pytest
import torch

from quamba import ops
from quamba.errors import QuambaError
from quamba.ops import native
from quamba.ops.cpu import linear as cpu

from .helpers import Source, assert_close, check_registration, clone, round_clip, run_both, wide

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# (M, K, N): the float32, the integer and the oneDNN path, and sizes that are multiples of nothing.
SIZES = [
    (1, 1, 1),
    (1, 16, 512),
    (3, 17, 5),
    (1, 256, 1024),
    (1, 1025, 33),
    (17, 129, 151),
    (600, 151, 129),
    (2, 1030, 1100),
]


def arguments(
    m=3, k=17, n=5, *, bias=None, residual=None, out="float", per_token=False, out_dtype=torch.float32, seed=0
):
    source = Source(seed)
    out_scale = {"float": None, "tensor": source.scale(around=0.05 * k**0.5)}.get(out)
    if out == "channel":
        out_scale = source.scale(n, around=0.05 * k**0.5)
    return [
        source.int8(m, k),
        source.scale(m, 1, around=0.03) if per_token else source.scale(around=0.03),
        source.int8(n, k),
        source.scale(n, around=0.002),
        None if bias is None else source.normal(n, dtype=bias),
        None if residual is None else source.normal(m, n, dtype=residual),
        out_scale,
        out_dtype if out_scale is None else torch.int8,
    ]


def definition(x, x_scale, weight, weight_scale, bias, residual, out_scale, out_dtype):
    sums = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    out = sums * (wide(x_scale) * wide(weight_scale))
    for term in (bias, residual):
        out = out if term is None else out + wide(term)
    return out if out_scale is None else round_clip(out / wide(out_scale))


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize("out", ["float", "tensor", "channel"])
@pytest.mark.parametrize("per_token", [False, True])
def test_against_reference_and_definition(m, k, n, out, per_token):
    for bias, residual in itertools.product((None, torch.bfloat16), (None, torch.float16)):
        args = arguments(m, k, n, bias=bias, residual=residual, out=out, per_token=per_token)
        run_both(ops.linear, args)
        with ops.reference():
            assert_close(ops.linear(*args), definition(*args))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 7), (600, 151, 129)])
@pytest.mark.parametrize("residual", [None, torch.float32])
def test_float_dtypes(out_dtype, m, k, n, residual):
    run_both(ops.linear, arguments(m, k, n, out_dtype=out_dtype, bias=out_dtype, residual=residual))


@pytest.mark.parametrize(("m", "k", "n"), [*SIZES, (1, 4096, 17), (64, 4096, 300)])
def test_extreme_sums_are_exact(m, k, n):
    """All products +2^14 or -127 * 128: the largest sums, which saturate where a kernel adds in 16 bits."""
    for x_value, weight_value in ((-128, -128), (127, -128), (-128, 127), (127, 127)):
        args = arguments(m, k, n)
        args[0].fill_(x_value)
        args[2].fill_(weight_value)
        args[1], args[3] = torch.tensor(1.0), torch.ones(n)
        assert torch.equal(ops.linear(*args), torch.full((m, n), float(np.float32(x_value * weight_value * k))))


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_integer_results_are_exact_where_no_rounding_is_near(m, k, n):
    """Scales that are powers of two: every intermediate is exact, so not one element may differ."""
    args = arguments(m, k, n, bias=torch.float32, out="tensor")
    args[1], args[3], args[6] = torch.tensor(0.5), torch.full((n,), 0.25), torch.tensor(64.0)
    args[4] = torch.round(args[4])
    expected = definition(*args)
    assert np.array_equal(ops.linear(*args).numpy(), expected)


@pytest.mark.parametrize(("m", "k", "n"), [(5, 64, 40), (600, 151, 129)])
@pytest.mark.parametrize("out_scale", [1e-12, 1e12])
def test_saturation_and_zeros(m, k, n, out_scale):
    args = arguments(m, k, n, out="tensor")
    args[6] = torch.tensor(out_scale)
    run_both(ops.linear, args)
    args[0].zero_()
    assert not ops.linear(*args).any()


def test_leading_dimensions_and_strides():
    source = Source()
    wide_x = source.int8(2, 3, 40)
    for x in (wide_x[..., 5:22], wide_x.transpose(0, 1)[..., ::2], wide_x[1, 2, 3:20], wide_x[:, :, :0].contiguous()):
        k = x.shape[-1]
        weight = source.int8(k, 9).t()
        args = [x, source.scale(), weight, source.scale(9), None, None, None, torch.float32]
        assert ops.linear(*args).shape == (*x.shape[:-1], 9)
        run_both(ops.linear, args)
        args[1], args[5] = source.scale(*x.shape[:-1], 1), source.normal(*x.shape[:-1], 18)[..., ::2]
        run_both(ops.linear, args)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 600), (0, 30000)])
@pytest.mark.parametrize("out", ["float", "tensor"])
def test_no_rows(shape, out):
    args = arguments(1, shape[-1], 40, out=out, bias=torch.float32)
    args[0] = torch.empty(shape, dtype=torch.int8)
    assert run_both(ops.linear, args).shape == (*shape[:-1], 40)


def test_large_weight_with_one_row_takes_onednn_without_native_code():
    if native.available():
        pytest.skip("the native library takes single rows")
    args = arguments(1, 1030, 1100, out="tensor")
    before = len(cpu._packed)
    run_both(ops.linear, args)
    if not cpu.onednn_is_exact():
        pytest.skip("this CPU or build has no usable oneDNN int8 linear")
    weight = args[2]
    ops.linear(*args)
    assert len(cpu._packed) == before + 1
    del args, weight
    gc.collect()
    assert len(cpu._packed) == before


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(cpu, "onednn_is_exact", lambda: False)
    for m, k, n in SIZES:
        run_both(ops.linear, arguments(m, k, n, out="channel", bias=torch.float32))


def changes():
    def weight_in_place(args):
        args[2].neg_()

    def weight_rows(args):
        args[2][1:3].zero_()

    def weight_data(args):
        args[2].data = args[2].data.flip(0).clone()

    def new_weight(args):
        args[2] = args[2].flip(0).contiguous()

    def copied(args):
        args[2] = copy.deepcopy(args[2])
        args[2].neg_()

    def scale_in_place(args):
        args[3].mul_(2)

    def input_scale_in_place(args):
        args[1].mul_(3)

    def bias_in_place(args):
        args[4].add_(1)

    def out_scale_in_place(args):
        args[6].mul_(0.5)

    def no_bias(args):
        args[4] = None

    def inference_weight(args):
        with torch.inference_mode():
            args[2] = args[2].flip(0).contiguous()
            ops.linear(*args)
            args[2].neg_()

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 16, 64), (1, 256, 1024), (600, 151, 129)])
def test_changes_are_seen(change, m, k, n):
    args = arguments(m, k, n, bias=torch.float32, out="channel")
    before = ops.linear(*args)
    assert torch.equal(ops.linear(*args), before)
    change(args)
    with torch.inference_mode():
        after = run_both(ops.linear, args)
    with ops.reference():
        assert_close(ops.linear(*args), ops.linear(*clone(args)))
        expected = ops.linear(*args)
    assert_close(ops.linear(*args), expected)
    assert not torch.equal(after, before)


def test_load_state_dict_is_seen():
    class Holder(torch.nn.Module):
        def __init__(self, args):
            super().__init__()
            self.register_buffer("weight", args[2])
            self.register_buffer("scale", args[3])

        def forward(self, x, x_scale):
            return ops.linear(x, x_scale, self.weight, self.scale, None, None, None, torch.float32)

    first, second = arguments(600, 151, 129, seed=1), arguments(600, 151, 129, seed=2)
    holder, other = Holder(first), Holder(second)
    before = holder(*first[:2])
    holder.load_state_dict(other.state_dict())
    assert torch.equal(holder(*first[:2]), other(*first[:2]))
    assert not torch.equal(holder(*first[:2]), before)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(3, 17), "found x of dtype torch.float32; expected int8"),
        (0, torch.zeros(3, 16, dtype=torch.int8), r"found x of shape \(3, 16\); expected \(3, 17\)"),
        (1, torch.ones(4, 1), r"found x_scale of shape \(4, 1\); expected \(3, 1\)"),
        (1, torch.tensor(1.0, dtype=torch.float64), "found x_scale of dtype torch.float64; expected float32"),
        (2, torch.zeros(5, 17), "found weight of dtype torch.float32; expected int8"),
        (3, torch.ones(4), r"found weight_scale of shape \(4,\); expected \(\) or \(5,\)"),
        (4, torch.ones(4), r"found bias of shape \(4,\); expected \(5,\)"),
        (5, torch.ones(3, 4), r"found residual of shape \(3, 4\); expected \(3, 5\)"),
        (6, torch.ones(3), r"found out_scale of shape \(3,\)|found out_dtype"),
        (7, torch.int8, "found out_dtype torch.int8 with no out_scale"),
        (7, torch.int32, "found out_dtype torch.int32"),
    ],
)
def test_wrong_arguments_raise(position, value, words):
    args = arguments()
    args[position] = value
    with pytest.raises(QuambaError, match=words):
        ops.linear(*args)


def test_out_scale_of_wrong_shape_raises():
    args = arguments(out="channel")
    args[6] = torch.ones(4)
    with pytest.raises(QuambaError, match=r"found out_scale of shape \(4,\); expected \(\) or \(5,\)"):
        ops.linear(*args)


@pytest.mark.parametrize(
    "variant", [{}, {"out": "channel", "bias": torch.bfloat16}, {"per_token": True, "residual": torch.float16}]
)
def test_registration(variant):
    check_registration(ops.linear, arguments(**variant))
