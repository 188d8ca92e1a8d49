"""blocks_prefill against the composition of the ops, the references' composition, and mixer_step token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quamba import ops
from quamba.errors import QuambaError
from tests.ops.helpers import Source, assert_close, check_registration, clone
from tests.ops.test_mixer_step import CHANGES as STEPS
from tests.ops.test_mixer_step import NAMES as STEP_NAMES
from tests.ops.test_mixer_step import arguments as step_arguments
from tests.ops.test_mixer_step import assert_same_step

NAMES = [*STEP_NAMES[:-3], "wide_dtype", "out_dtype", "mask", "conv_state", "ssm_state"]
BLOCK = slice(1, NAMES.index("wide_dtype"))
CHANGES: dict[str, dict[str, Any]] = {
    **{name: change for name, change in STEPS.items() if change.get("batch", 1) < 17},
    "one token": {"length": 1},
    "shorter than the convolution": {"length": 2},
    "longer": {"length": 67, "batch": 1},
    "no tokens": {"length": 0},
    "no states": {"states": ()},
    "conv state alone": {"states": ("conv_state",)},
    "ssm state alone": {"states": ("ssm_state",)},
    "mask": {"mask": torch.bool},
    "integer mask, no states": {"mask": torch.int64, "states": ()},
    "half precision between the ops": {"wide": torch.float16, "norms": "learned", "float_dt": True},
    "bfloat16 between the ops": {"wide": torch.bfloat16},
}


def arguments(
    *,
    length: int = 9,
    mask: torch.dtype | None = None,
    states: tuple[str, ...] = ("conv_state", "ssm_state"),
    wide: torch.dtype = torch.float32,
    **changes: Any,
) -> list[Any]:
    """The arguments of a random block for a step, those of a sequence in the places of the others."""
    values = dict(zip(STEP_NAMES, step_arguments(**changes), strict=True))
    source = Source(7)
    batch, model = values["hidden"].shape
    values["hidden"] = (3 * source.normal(batch, length, model)).to(values["hidden"].dtype)
    padding = torch.arange(length) >= torch.arange(batch)[:, None] * 2 + 1
    values |= {"wide_dtype": wide, "mask": None if mask is None else padding.to(mask)}
    values |= {name: values[name] if name in states else None for name in ("conv_state", "ssm_state")}
    return [values[name] for name in NAMES]


def together(args: list[Any]) -> Tensor:
    """The block in one op."""
    block = ops.Block(*args[BLOCK])
    out: Tensor = ops.blocks_prefill(args[0], [block.number], *in_lists(args))
    return out


def in_lists(args: list[Any]) -> list[Any]:
    """The arguments behind the block's, the states in lists."""
    *others, conv, ssm = args[BLOCK.stop :]
    return [*others, [] if conv is None else [conv], [] if ssm is None else [ssm]]


def op_by_op(args: list[Any]) -> Tensor:
    """The block through the single ops, as a quantized mixer calls them."""
    a = dict(zip(NAMES, args, strict=True))
    inner, size = a["A"].shape
    sizes, int8, wide = [a["dt_weight"].shape[1], size, size], torch.int8, a["wide_dtype"]
    x0_scale, z_scale = a["xz_scale"].split(inner)
    scales = a["dbc_scale"].split(sizes)
    u = ops.rms_norm_quant(a["hidden"], a["norm_weight"], a["u_scale"], a["norm_eps"])
    product = (a["in_weight"], a["in_weight_scale"], a["in_bias"])
    x0, z = ops.linear(u, a["u_scale"], *product, None, a["xz_scale"], int8).split(inner, dim=-1)
    conv = (a["conv_weight"], a["conv_weight_scale"], a["conv_bias"], a["x_scale"])
    x = ops.causal_conv1d(x0, x0_scale, *conv, int8, a["mask"], a["conv_state"])
    product = (x, a["x_in_scale"], a["x_weight"], a["x_weight_scale"], None, None)
    if a["dbc_eps"] is None:
        d, B, C = ops.linear(*product, a["dbc_scale"], int8).split(sizes, dim=-1)
    else:
        d, B, C = (
            ops.rms_norm_quant(part, a[f"{name}_norm_weight"], scale, a["dbc_eps"])
            for name, part, scale in zip(
                "dBC", ops.linear(*product, None, wide).split(sizes, dim=-1), scales, strict=True
            )
        )
    dt_dtype = wide if a["dt_scale"] is None else int8
    dt = ops.linear(d, scales[0][0], a["dt_weight"], a["dt_weight_scale"], None, None, a["dt_scale"], dt_dtype)
    scan = (
        x,
        a["x_scan_scale"],
        dt,
        a["dt_scale"],
        a["dt_bias"],
        a["A"],
        B,
        scales[1],
        C,
        scales[2],
        a["D"],
        z,
        z_scale,
    )
    if a["rotate"]:
        g = ops.hadamard_quant(ops.selective_scan(*scan, None, wide, a["ssm_state"]), a["g_scale"])
    else:
        g = ops.selective_scan(*scan, a["g_scale"], int8, a["ssm_state"])
    residual = a["hidden"] if a["residual"] else None
    product = (a["out_weight"], a["out_weight_scale"], a["out_bias"], residual)
    return ops.linear(g, a["g_scale"], *product, None, a["out_dtype"])


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_equals_the_single_ops_and_the_reference(name: str) -> None:
    args = arguments(**CHANGES[name])
    first, second, third = clone(args), clone(args), clone(args)
    out, expected = together(first), op_by_op(second)
    assert (out.shape, out.dtype) == (expected.shape, args[NAMES.index("out_dtype")])
    assert out.is_contiguous()
    for found, wanted in zip((out, *first), (expected, *second), strict=True):
        assert torch.equal(found, wanted) if isinstance(found, Tensor) else found == wanted or found is wanted
    with ops.reference():
        wanted = together(third)
        assert torch.equal(wanted, op_by_op(clone(args)))
    if out.numel() > 0:
        difference = (out.double() - wanted.double()).abs()
        assert float(difference.max()) <= 0.05 * max(1.0, float(wanted.abs().max()))
        assert float((difference > 1e-2 * wanted.abs().max()).double().mean()) <= 0.05


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "no rotation", "learned norms", "scales per channel", "projection biases"])
def test_goes_on_like_single_steps(name: str) -> None:
    args = arguments(**STEPS[name])
    whole, steps = clone(args), clone(args)
    out = together(whole)
    rows = [
        ops.mixer_step(token[:, 0], *steps[BLOCK], args[NAMES.index("out_dtype")], *steps[-2:])
        for token in steps[0].split(1, dim=1)
    ]
    assert_same_step((torch.stack(rows, dim=1), *steps[-2:]), (out, *whole[-2:]))


@torch.no_grad()
def test_padding_counts_for_nothing() -> None:
    args = arguments(batch=1, length=9, states=())
    position = NAMES.index("mask")
    args[0] = args[0].repeat(2, 1, 1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    args[position] = mask
    out = together(args)
    short = [args[0][1:, 4:], *args[1:position], None, *args[position + 1 :]]
    assert_close(out[1:, 4:], together(short))
    assert not torch.equal(out[0, 4:], out[1, 4:])


@pytest.mark.parametrize("name", ["plain", "learned norms", "mask", "no states", "half precision"])
def test_registration(name: str) -> None:
    args = arguments(**CHANGES[name])
    block = ops.Block(*args[BLOCK])
    check_registration(ops.blocks_prefill, [args[0], [block.number], *in_lists(args)])


@torch.no_grad()
def test_strided_arguments() -> None:
    args = arguments(mask=torch.bool)
    expected = clone(args)
    out = together(expected)
    for index, name in enumerate(NAMES):
        value = args[index]
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        spread = torch.zeros((*value.shape, 2), dtype=value.dtype)
        spread[..., 0] = value
        fresh = clone(args)
        fresh[index] = spread[..., 0]
        assert_close(together(fresh), out)
        assert not spread[..., 1].any()
        if name.endswith("_state"):
            assert_close(spread[..., 0], expected[index])


@pytest.mark.parametrize("name", ["hidden", "in_weight", "conv_weight", "A", "ssm_state"])
def test_wrong_dtypes_raise(name: str) -> None:
    args = arguments()
    index = NAMES.index(name)
    args[index] = args[index].to(torch.int32)
    with torch.no_grad(), pytest.raises((QuambaError, RuntimeError)):
        together(args)


@torch.no_grad()
@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_its_blocks(out_dtype: torch.dtype, with_states: bool) -> None:
    kinds = [{}, {"norms": "weightless", "channels": True}, {"float_dt": True, "biases": True, "rotate": False}]
    args = [arguments(seed=seed, mask=torch.bool, out_dtype=out_dtype, **kind) for seed, kind in enumerate(kinds)]
    blocks = [ops.Block(*one[BLOCK]) for one in args]
    numbers = [block.number for block in blocks]
    wide, _, mask, _, _ = args[0][BLOCK.stop :]
    states = [[one[i].clone() for one in args] if with_states else [] for i in (-2, -1)]
    out = ops.blocks_prefill(args[0][0], numbers, wide, out_dtype, mask, *states)
    hidden = args[0][0]
    for i, one in enumerate(args):
        own = [one[-2].clone(), one[-1].clone()] if with_states else [None, None]
        hidden = together([hidden, *one[BLOCK], wide, out_dtype, mask, *own])
        if with_states:
            assert torch.equal(states[0][i], own[0])
            assert torch.equal(states[1][i], own[1])
    assert torch.equal(out, hidden)
    assert out.dtype is out_dtype
    for wrong in ([], [[], states[1][:-1]], [states[0], states[1][:1]]):
        if with_states or not wrong:
            with pytest.raises(ValueError, match="blocks_prefill: found"):
                ops.blocks_prefill(args[0][0], numbers if wrong else [], wide, out_dtype, mask, *(wrong or [[], []]))
