"""mixer_step: native and composed against the references' composition, and against a plain float64 block."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quamba import hadamard, numerics, ops
from quamba.errors import QuambaError
from quamba.ops import native
from tests.ops.helpers import Source, check_registration, clone, round_clip, wide

# The positions of the two states, of dt_scale and so on: arguments go by position, as in the schema.
NAMES = [
    "hidden", "norm_weight", "norm_eps", "u_scale", "in_weight", "in_weight_scale", "in_bias", "xz_scale",
    "conv_weight", "conv_weight_scale", "conv_bias", "x_scale", "x_weight", "x_weight_scale", "x_in_scale",
    "x_scan_scale", "d_norm_weight", "B_norm_weight", "C_norm_weight", "dbc_eps", "dbc_scale", "dt_weight",
    "dt_weight_scale", "dt_scale", "dt_bias", "A", "D", "rotate", "g_scale", "out_weight", "out_weight_scale",
    "out_bias", "residual", "out_dtype", "conv_state", "ssm_state",
]  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"batch": 1},
    "three tokens": {"batch": 3},
    "many tokens": {"batch": 17},
    "more than a chunk of tokens": {"batch": 69, "inner": 8, "model": 6},
    "K 2": {"width": 2},
    "K 3": {"width": 3},
    "K 1": {"width": 1},
    "K 7": {"width": 7},
    "N 5": {"size": 5},
    "N 16": {"size": 16},
    "N 19": {"size": 19},
    "N 1": {"size": 1},
    "inner 24": {"inner": 24},
    "inner 20, its own base": {"inner": 20},
    "inner 7, seven blocks": {"inner": 7},
    "inner 36": {"inner": 36},
    "inner 128": {"inner": 128, "model": 67},
    "inner 384": {"inner": 384, "model": 80, "rank": 5, "size": 16},
    "rank 1": {"rank": 1},
    "rank 70": {"rank": 70},
    "model 1": {"model": 1},
    "no rotation": {"rotate": False},
    "no residual": {"residual": False},
    "learned norms": {"norms": "learned"},
    "weightless norms": {"norms": "weightless"},
    "float dt": {"float_dt": True},
    "no convolution bias": {"conv_bias": False},
    "projection biases": {"biases": True},
    "scales per channel": {"channels": True},
    "scales per channel, no rotation, float dt": {"channels": True, "rotate": False, "float_dt": True},
    "one scale per weight": {"weight_tensor": True},
    "half precision": {"dtype": torch.bfloat16, "biases": True, "norms": "learned"},
    "half precision, residual in float32": {"dtype": torch.float16, "out_dtype": torch.float32},
    "half precision out": {"out_dtype": torch.bfloat16},
    "double precision hidden states": {"dtype": torch.float64},
}


def arguments(
    *,
    batch: int = 2,
    model: int = 24,
    inner: int = 48,
    size: int = 8,
    width: int = 4,
    rank: int = 3,
    norms: str = "none",
    rotate: bool = True,
    residual: bool = True,
    float_dt: bool = False,
    conv_bias: bool = True,
    biases: bool = False,
    channels: bool = False,
    weight_tensor: bool = False,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Any]:
    """A random block whose values fill their int8 ranges, and states that are not zero."""
    source = Source(seed)
    rows = rank + 2 * size

    def weight_scale(rows: int, depth: int) -> Tensor:
        return source.scale(*(() if weight_tensor else (rows,)), around=1.4 / (74 * depth**0.5))

    def scale(around: float) -> Tensor:
        return source.scale(*((inner,) if channels else ()), around=around)

    def vector(count: int, present: bool, mean: float = 0.0) -> Tensor | None:
        return (mean + 0.3 * source.normal(count)).to(dtype) if present else None

    learned, x_scale = norms == "learned", scale(0.012)
    values = {
        "hidden": (3 * source.normal(batch, model)).to(dtype),
        "norm_weight": vector(model, True, 1.0),
        "norm_eps": 0.3,
        "u_scale": source.scale(around=0.02),
        "in_weight": source.int8(2 * inner, model),
        "in_weight_scale": weight_scale(2 * inner, model),
        "in_bias": vector(2 * inner, biases),
        "xz_scale": source.scale(2 * inner) if channels else source.scale().expand(2 * inner).clone(),
        "conv_weight": source.int8(inner, width),
        "conv_weight_scale": weight_scale(inner, width),
        "conv_bias": vector(inner, conv_bias),
        "x_scale": x_scale,
        "x_weight": source.int8(rows, inner),
        "x_weight_scale": weight_scale(rows, inner) * (0.02 if channels else 2),
        "x_in_scale": torch.ones(()) if channels else x_scale,
        "x_scan_scale": x_scale * source.scale(inner, around=1.0) if channels else x_scale,
        "d_norm_weight": vector(rank, learned, 1.0),
        "B_norm_weight": vector(size, learned, 1.0),
        "C_norm_weight": vector(size, learned, 1.0),
        "dbc_eps": None if norms == "none" else 0.07,
        "dbc_scale": torch.cat([source.scale().expand(rank), source.scale().expand(size), source.scale(size)]),
        "dt_weight": source.int8(inner, rank),
        "dt_weight_scale": weight_scale(inner, rank),
        "dt_scale": None if float_dt else scale(0.02),
        "dt_bias": (-2 + source.normal(inner)).to(dtype),
        "A": -torch.exp(0.5 * source.normal(inner, size)),
        "D": vector(inner, True, 1.0),
        "rotate": rotate,
        "g_scale": source.scale(around=0.01),
        "out_weight": source.int8(model, inner),
        "out_weight_scale": weight_scale(model, inner),
        "out_bias": vector(model, biases),
        "residual": residual,
        "out_dtype": dtype if out_dtype is None else out_dtype,
        "conv_state": source.int8(batch, inner, width),
        "ssm_state": source.normal(batch, inner, size),
    }
    assert list(values) == NAMES
    return list(values.values())


def simulate(args: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The block in float64: (out, conv_state, ssm_state)."""
    a = {name: wide(v) if isinstance(v, Tensor) else v for name, v in zip(NAMES, args, strict=True)}
    inner, size = a["A"].shape

    def norm(x: np.ndarray, weight: np.ndarray | None, eps: float, scale: np.ndarray) -> np.ndarray:
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
        return round_clip(x * (1 if weight is None else weight) / scale)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    u = norm(a["hidden"], a["norm_weight"], a["norm_eps"], a["u_scale"])
    xz = u @ a["in_weight"].T * a["u_scale"] * a["in_weight_scale"] + (0 if a["in_bias"] is None else a["in_bias"])
    xz = round_clip(xz / a["xz_scale"])
    x0, z = xz[:, :inner], xz[:, inner:] * a["xz_scale"][inner:]
    window = np.concatenate([a["conv_state"][:, :, 1:], x0[:, :, None]], axis=2)
    x = (window * a["conv_weight"]).sum(axis=2) * a["xz_scale"][:inner] * a["conv_weight_scale"]
    x = x + (0 if a["conv_bias"] is None else a["conv_bias"])
    x = round_clip(x * sigmoid(x) / a["x_scale"])
    dbc = x @ a["x_weight"].T * a["x_in_scale"] * a["x_weight_scale"]
    cuts = [len(a["dbc_scale"]) - 2 * size, len(a["dbc_scale"]) - size]
    scales = np.split(a["dbc_scale"], cuts)
    if a["dbc_eps"] is None:
        parts = np.split(round_clip(dbc / a["dbc_scale"]), cuts, axis=1)
    else:
        weights = [a[f"{name}_norm_weight"] for name in "dBC"]
        parts = [
            norm(*part, a["dbc_eps"], s) for *part, s in zip(np.split(dbc, cuts, axis=1), weights, scales, strict=True)
        ]
    d, B, C = (part * s for part, s in zip(parts, scales, strict=True))
    dt = d @ a["dt_weight"].T * a["dt_weight_scale"]
    if a["dt_scale"] is not None:
        dt = round_clip(dt / a["dt_scale"]) * a["dt_scale"]
    dt = np.logaddexp(0, dt + a["dt_bias"])
    x = x * a["x_scan_scale"]
    state = np.exp(dt[:, :, None] * a["A"]) * a["ssm_state"] + (dt * x)[:, :, None] * B[:, None, :]
    g = (np.einsum("bdn,bn->bd", state, C) + a["D"] * x) * z * sigmoid(z)
    if a["rotate"]:
        g = g @ hadamard.matrix(inner).numpy().T
    out = round_clip(g / a["g_scale"]) @ a["out_weight"].T * a["g_scale"] * a["out_weight_scale"]
    out = out + (0 if a["out_bias"] is None else a["out_bias"]) + (a["hidden"] if a["residual"] else 0)
    return out, window, state


def assert_same_step(
    found: tuple[Tensor, Tensor, Tensor], expected: tuple[Any, Any, Any], *, tolerance: float = 1e-5
) -> None:
    """(out, conv_state, ssm_state): a value at the edge of an int8 step may fall to its other side, rarely."""
    out, conv, ssm = (torch.as_tensor(value).to(torch.float64) for value in expected)
    assert (found[1].to(torch.float64) - conv).abs().max() <= 1
    assert (found[1] != conv).double().mean() <= max(2e-3, 1.01 / conv.numel())
    for actual, wanted in ((found[0], out), (found[2], ssm)):
        assert actual.isfinite().all()
        error = (actual.to(torch.float64) - wanted).abs() - torch.finfo(actual.dtype).eps * wanted.abs()
        assert float(error.max()) <= 0.03 * max(1.0, float(wanted.abs().max()))
        assert float((error > tolerance * wanted.abs().max()).double().mean()) <= 0.25
    assert numerics.sqnr_db(ssm, found[2]) > 45


def stepped(args: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    fresh = clone(args)
    out = ops.mixer_step(*fresh)
    for before, after in zip(args[:-2], fresh[:-2], strict=True):
        assert not isinstance(before, Tensor) or torch.equal(before, after)
    return out, fresh[-2], fresh[-1]


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_equals_reference_and_simulation(name: str) -> None:
    args = arguments(**CHANGES[name])
    found = stepped(args)
    with ops.reference():
        expected = stepped(args)
    assert (found[0].shape, found[0].dtype) == (expected[0].shape, expected[0].dtype)
    assert found[0].is_contiguous()
    assert_same_step(found, expected)
    assert_same_step(expected, simulate(args))
    assert_same_step(found, simulate(args))


@torch.no_grad()
def test_hardly_any_value_falls_to_the_other_side() -> None:
    exact = 0
    for seed in range(40):
        args = arguments(seed=seed, channels=seed % 2 == 1, norms=("none", "learned", "weightless")[seed % 3])
        out, conv, ssm = stepped(args)
        with ops.reference():
            expected = stepped(args)
        close = [torch.allclose(a, e, rtol=1e-5, atol=1e-5) for a, e in ((out, expected[0]), (ssm, expected[2]))]
        exact += torch.equal(conv, expected[1]) and all(close)
    assert exact >= 36


@torch.no_grad()
def test_many_steps_follow_the_reference() -> None:
    args, other = arguments(seed=3), arguments(seed=3)
    for seed in range(20):
        args[0] = other[0] = 3 * Source(seed).normal(2, 24)
        found = ops.mixer_step(*args)
        with ops.reference():
            expected = ops.mixer_step(*other)
        assert numerics.sqnr_db(expected - other[0], found - args[0]) > 30
    assert_same_step((found, *args[-2:]), (found, *other[-2:]))


@pytest.mark.parametrize("name", ["plain", "learned norms", "half precision", "projection biases"])
def test_registration(name: str) -> None:
    check_registration(ops.mixer_step, arguments(**CHANGES[name]))


@torch.no_grad()
def test_strided_arguments() -> None:
    args = arguments()
    plain = stepped(args)
    for index, name in enumerate(NAMES):
        value = args[index]
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        spread = torch.empty((*value.shape, 2), dtype=value.dtype)
        spread[..., 0], spread[..., 1] = value, 99
        strided = [*args[:index], spread[..., 0], *args[index + 1 :]]
        assert not strided[index].is_contiguous()
        # Also where a strided state takes the op from the native library to the composition.
        assert_same_step(stepped(strided), plain)
        if name.endswith("_state"):
            ops.mixer_step(*clone(strided[:index]), strided[index], *clone(strided[index + 1 :]))
            assert (spread[..., 1] == 99).all()
            assert (spread[..., 0] != value).any()


@torch.no_grad()
@pytest.mark.parametrize("extreme", ["loud", "silent", "saturated", "long memory", "no memory", "large state"])
def test_extremes(extreme: str) -> None:
    args = arguments(size=16)
    a = dict(zip(NAMES, args, strict=True))
    if extreme == "loud":
        a["hidden"] *= 1e18
    elif extreme == "silent":
        a["hidden"].zero_()
        a["conv_state"].zero_()
        a["ssm_state"].fill_(1e-40)
    elif extreme == "saturated":
        for name in ("in_weight", "x_weight", "conv_weight", "dt_weight", "out_weight"):
            a[name].copy_(torch.where(a[name] < 0, -128, 127))
        a["xz_scale"].mul_(1e-3)
        a["conv_state"].copy_(torch.where(a["conv_state"] < 0, -128, 127))
    elif extreme == "long memory":
        a["dt_bias"].fill_(-40.0)
    elif extreme == "no memory":
        a["dt_bias"].fill_(90.0)
    else:
        a["ssm_state"].mul_(1e20)
    found = stepped(args)
    with ops.reference():
        expected = stepped(args)
    torch.testing.assert_close(found[1], expected[1])
    for actual, wanted in ((found[0], expected[0]), (found[2], expected[2])):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@torch.no_grad()
def test_instruction_sets_agree(implementation: str) -> None:
    library = native.library()
    if library is None:
        pytest.skip("there is one torch implementation")
    best = library.isa()
    try:
        for name in ("plain", "inner 20, its own base", "inner 384", "learned norms", "N 19", "K 3", "many tokens"):
            args = arguments(**CHANGES[name])
            with ops.reference():
                expected = stepped(args)
            for isa in ("generic", "avx2", "avx512"):
                if isa == "generic" or best == "avx512" or best == isa:
                    library.select(isa)
                    assert library.isa() == isa
                    assert_same_step(stepped(args), expected)
    finally:
        library.select("best")
    assert library.isa() == best


@torch.no_grad()
def test_changed_parameters_are_seen() -> None:
    args = arguments(biases=True, dtype=torch.bfloat16, norms="learned", residual=False)
    position = {name: index for index, name in enumerate(NAMES)}
    changes = {
        "norm_weight": lambda t: t.mul_(1.5),
        "u_scale": lambda t: t.mul_(1.5),
        "out_bias": lambda t: t.add_(2),
        "out_weight_scale": lambda t: t.mul_(2),
        "in_weight": lambda t: t.copy_(t.flip(0)),
        "D": lambda t: setattr(t, "data", t.data * 3),
    }
    before = stepped(args)[0]
    assert torch.equal(stepped(args)[0], before)
    for name, change in changes.items():
        live = clone(args)
        ops.mixer_step(*clone(live[:1]), *live[1:-2], *clone(live[-2:]))
        change(live[position[name]])
        found = ops.mixer_step(*clone(live[:1]), *live[1:-2], *clone(live[-2:]))
        with ops.reference():
            expected = ops.mixer_step(*clone(live))
        assert not torch.equal(found, before), name
        assert numerics.sqnr_db(expected, found) > 35, name
    for name, value in {"norm_eps": 9.0, "dbc_eps": 5.0, "rotate": False, "residual": True}.items():
        other = [value if n == name else v for n, v in zip(NAMES, args, strict=True)]
        assert not torch.equal(stepped(other)[0], before), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hidden", torch.zeros(2, 25)),
        ("hidden", torch.zeros(2, 24, dtype=torch.int8)),
        ("in_weight", torch.zeros(96, 25, dtype=torch.int8)),
        ("in_weight", torch.zeros(96, 24)),
        ("u_scale", torch.ones((), dtype=torch.float64)),
        ("xz_scale", torch.ones(95)),
        ("x_scale", torch.ones(47)),
        ("dt_bias", torch.zeros(1)),
        ("conv_state", torch.zeros(2, 48, 4)),
        ("conv_state", torch.zeros(1, 48, 4, dtype=torch.int8)),
        ("ssm_state", torch.zeros(2, 48, 8, dtype=torch.bfloat16)),
        ("ssm_state", torch.zeros(2, 47, 8)),
        ("out_dtype", torch.int8),
    ],
)
def test_wrong_arguments_raise(name: str, wrong: Any) -> None:
    args = [wrong if n == name else value for n, value in zip(NAMES, arguments(), strict=True)]
    with pytest.raises(QuambaError):
        ops.mixer_step(*args)


@torch.no_grad()
def test_threads_change_nothing(implementation: str) -> None:
    args = arguments(batch=5, model=1024, inner=2048, size=16, rank=64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = stepped(args)
        torch.set_num_threads(2)
        assert_same_step(stepped(args), alone)
    finally:
        torch.set_num_threads(threads)
