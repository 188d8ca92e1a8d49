"""embedding: CPU against the reference, the reference against NumPy."""

import pytest
import torch

from quamba import ops
from quamba.errors import QuambaError

from .helpers import Source, assert_close, check_registration, run_both, wide


def arguments(shape=(2, 3), v=11, e=17, *, ids=torch.int64, scale="row", columns=False, out_dtype=torch.float32):
    source = Source()
    return [
        torch.randint(0, v, shape, dtype=ids, generator=source.generator),
        source.int8(v, e),
        source.scale(*([v] if scale == "row" else [])),
        source.scale(e) if columns else None,
        out_dtype,
    ]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (1, 17), (2, 1, 5)])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("scale", ["row", "tensor"])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_reference_and_definition(shape, ids, scale, columns, out_dtype):
    args = arguments(shape, ids=ids, scale=scale, columns=columns, out_dtype=out_dtype)
    out = run_both(ops.embedding, args)
    rows = wide(args[1])[args[0].numpy()]
    factor = wide(args[2]) if scale == "tensor" else wide(args[2])[args[0].numpy()][..., None]
    assert out.dtype == out_dtype
    assert_close(out, rows * factor * (wide(args[3]) if columns else 1.0))


def test_strided_ids_and_weight():
    args = arguments((4, 6))
    args[0] = args[0].t()[::2]
    args[1] = Source(1).int8(17, 11).t()
    run_both(ops.embedding, args)


def test_ids_out_of_range_raise():
    for bad in (11, -12):
        args = arguments()
        args[0][0, 0] = bad
        with pytest.raises(IndexError, match="out of range"):
            ops.embedding(*args)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, 3), "found ids of dtype torch.float32; expected int32 or int64"),
        (1, torch.zeros(11, 17), "found weight of dtype torch.float32; expected int8"),
        (1, torch.zeros(11, dtype=torch.int8), r"found weight of shape \(11,\); expected 2 dimensions"),
        (2, torch.ones(17), r"found weight_scale of shape \(17,\); expected \(\) or \(11,\)"),
        (3, torch.ones(11), r"found column_scale of shape \(11,\); expected \(17,\)"),
        (3, torch.ones(17, dtype=torch.float64), "found column_scale of dtype torch.float64; expected float32"),
        (4, torch.int8, "found out_dtype torch.int8 with no out_scale"),
    ],
)
def test_wrong_arguments_raise(position, value, words):
    args = arguments()
    args[position] = value
    with pytest.raises(QuambaError, match=words):
        ops.embedding(*args)


@pytest.mark.parametrize("scale", ["row", "tensor"])
@pytest.mark.parametrize("columns", [False, True])
def test_registration(scale, columns):
    check_registration(ops.embedding, arguments(scale=scale, columns=columns, out_dtype=torch.bfloat16))
