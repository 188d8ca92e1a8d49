import os
import subprocess
import sys

import pytest
import torch

from quamba.ops import linear, selective_scan, selective_scan_dt_step, selective_scan_step
from tests.cuda.compare import FLOATS, check, randint8, randn, scales, sliced, strided

NAMES = ("x", "x_scale", "dt", "dt_scale", "dt_bias", "A", "B", "B_scale", "C", "C_scale", "D", "z", "z_scale")


def arguments(batch=2, length=37, channels=24, states=16, dtype=torch.int8, per_channel=True, vector=torch.float32):
    def value(*shape):
        return randint8(*shape) if dtype == torch.int8 else randn(*shape, dtype=dtype)

    def scale(size, mean):
        if dtype != torch.int8:
            return None
        return scales(size, mean=mean) if per_channel else scales(mean=mean)

    return {
        "x": value(batch, length, channels),
        "x_scale": scale(channels, 0.02),
        "dt": value(batch, length, channels),
        "dt_scale": scale(channels, 0.05),
        "dt_bias": (torch.rand(channels, device="cuda") * 5 - 6).to(vector),
        "A": -torch.rand(channels, states, device="cuda") * 8 - 0.01,
        "B": value(batch, length, states),
        "B_scale": scale(states, 0.02),
        "C": value(batch, length, states),
        "C_scale": scale(states, 0.02),
        "D": randn(channels, dtype=vector),
        "z": value(batch, length, channels),
        "z_scale": scale(channels, 0.02),
    }


def run(args, out_scale=None, out=torch.float32, state=None, flips=2e-3, error=64.0, op=selective_scan):
    check(op, *[args[name] for name in NAMES], out_scale, out, state, flips=flips, error=error)


def state_for(args):
    return randn(args["x"].shape[0], *args["A"].shape)


@pytest.mark.parametrize("dtype", [torch.int8, *FLOATS])
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
@pytest.mark.parametrize("per_channel", [False, True])
def test_types(dtype, out, per_channel) -> None:
    args = arguments(dtype=dtype, per_channel=per_channel)
    scale = (scales(24, mean=0.1) if per_channel else scales(mean=0.1)) if out == torch.int8 else None
    run(args, scale, out, state_for(args))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 151])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 50, 264])
def test_shapes(length, channels) -> None:
    args = arguments(length=length, channels=channels)
    run(args, scales(channels, mean=0.1), torch.int8, state_for(args))
    run(args, None, torch.float16, None)


@pytest.mark.parametrize("states", [1, 5, 8, 16, 17, 32, 64])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_states(states, dtype) -> None:
    args = arguments(states=states, dtype=dtype)
    run(args, None, torch.float32, state_for(args))


# As many channels as take the kernels of 16, 8 and 4 lanes on 132 multiprocessors.
@pytest.mark.parametrize(("batch", "channels"), [(1, 1536), (1, 5120), (4, 5120), (7, 2056)])
@pytest.mark.parametrize("out", [torch.int8, torch.float16])
def test_large(batch, channels, out) -> None:
    args = arguments(batch=batch, length=70, channels=channels)
    run(args, scales(channels, mean=0.1) if out == torch.int8 else None, out, state_for(args))


@pytest.mark.parametrize("mixed", ["x", "dt", "B", "C", "z"])
def test_one_float_among_int8(mixed) -> None:
    args = arguments()
    args[mixed] = randn(*args[mixed].shape, dtype=torch.float16)
    run(args, None, torch.float32, state_for(args))
    args[f"{mixed}_scale"] = None
    run(args, scales(24, mean=0.1), torch.int8, None)


@pytest.mark.parametrize("vector", FLOATS)
def test_parameter_types_and_no_gate(vector) -> None:
    args = arguments(vector=vector)
    args["z"] = args["z_scale"] = None
    run(args, None, torch.float32, None)


@pytest.mark.parametrize("view", [strided, sliced])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_strides(view, dtype) -> None:
    args = arguments(dtype=dtype)
    for name in ("x", "dt", "B", "C", "z"):
        args[name] = view(args[name])
    run(args, None, torch.float32, state_for(args))


def test_extremes() -> None:
    args = arguments(length=200)
    args["dt_bias"] = torch.full_like(args["dt_bias"], 30.0)
    run(args)
    args["dt_bias"] = torch.full_like(args["dt_bias"], -40.0)
    run(args, state=state_for(args))
    args["A"] = torch.full_like(args["A"], -1e-6)
    args["dt_bias"] = torch.zeros_like(args["dt_bias"])
    run(args, state=state_for(args), error=512.0)


# The kernel of long int8 sequences takes chunks of 192 or 384 steps, blocks of 4 to 40 channels, and 512 steps or more.
@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 512, 4), (2, 577, 20), (1, 1151, 1536), (1, 769, 5124)])
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
def test_chunks(batch, length, channels, out) -> None:
    args = arguments(batch=batch, length=length, channels=channels)
    run(args, scales(channels, mean=0.1) if out == torch.int8 else None, out, state_for(args))


@pytest.mark.parametrize("states", [4, 8, 12, 16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_chunks_with_views(states, gated, per_channel) -> None:
    args = arguments(length=600, channels=44, states=states, per_channel=per_channel)
    for name in ("x", "dt", "B", "C", "z"):
        args[name] = sliced(args[name])
    if not gated:
        args["z"] = args["z_scale"] = None
    run(args, None, torch.float32, None)
    run(args, scales(mean=0.1), torch.int8, state_for(args))


@pytest.mark.parametrize("lanes", ["0", "16", "32"])
def test_every_number_of_lanes(lanes) -> None:
    environment = {**os.environ, "QUAMBA_SCAN_LANES": lanes}
    code = "from tests.cuda.test_selective_scan import arguments, run, state_for; import torch; torch.manual_seed(0)\n"
    code += "for length in (1, 31, 200, 700):\n"
    code += "    args = arguments(length=length, channels=72); run(args, None, torch.float32, state_for(args))"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


# Warps that hand each other the states: pieces of 16 steps, chunks of 64, blocks of one to five groups of 8 channels.
RELAY_SHAPES = [(1, 512, 8), (2, 577, 24), (1, 1151, 1536), (1, 783, 5128), (1, 1027, 5128)]


@pytest.mark.parametrize(("batch", "length", "channels"), RELAY_SHAPES)
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
@pytest.mark.parametrize("per_channel", [False, True])
def test_relay(batch, length, channels, out, per_channel) -> None:
    args = arguments(batch=batch, length=length, channels=channels, per_channel=per_channel)
    run(args, scales(channels, mean=0.1) if out == torch.int8 else None, out, state_for(args))


# Rows of 96 channels are copied in pieces of 16 bytes, those of 88 by 8.
@pytest.mark.parametrize("channels", [88, 96])
@pytest.mark.parametrize("gated", [False, True])
def test_relay_with_views(gated, channels) -> None:
    args = arguments(length=600, channels=channels)
    for name in ("x", "dt", "B", "C", "z"):
        args[name] = sliced(args[name])
    args["A"] = args["A"].T.contiguous().T
    if not gated:
        args["z"] = args["z_scale"] = None
    run(args, None, torch.float32, None)
    run(args, scales(mean=0.1), torch.int8, state_for(args))


def test_relay_with_a_turned_state() -> None:
    args = arguments(length=530, channels=40)
    start = state_for(args)
    turned = start.transpose(1, 2).contiguous().transpose(1, 2)
    values = [args[name] for name in NAMES]
    torch.testing.assert_close(
        selective_scan(*values, None, torch.float32, turned), selective_scan(*values, None, torch.float32, start)
    )
    torch.testing.assert_close(turned, start)


# 3x2: three groups that two blocks share; 3h to 5h: of 16 channels, two lanes each; on Hopper, elsewhere another kernel
@pytest.mark.parametrize("groups", ["0", "1", "2", "3", "4", "5", "3x2", "3h", "4h", "5h"])
def test_every_number_of_groups(groups) -> None:
    environment = {**os.environ, "QUAMBA_SCAN_RELAY": groups}
    code = "from tests.cuda.test_selective_scan import arguments, run, state_for; import torch; torch.manual_seed(0)\n"
    code += "for length in (1, 15, 16, 17, 48, 49, 63, 64, 65, 128, 129, 200, 321, 700):\n"
    code += "    for size in (72, 80):\n"
    code += "        args = arguments(length=length, channels=size); run(args, None, torch.float32, state_for(args))"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_long() -> None:
    run(arguments(batch=1, length=2048, channels=16), None, torch.float32, None)


@pytest.mark.parametrize("dtype", [torch.int8, *FLOATS])
@pytest.mark.parametrize("states", [1, 5, 16, 20, 64])
@pytest.mark.parametrize("batch", [1, 3, 4, 7, 8])
def test_step(dtype, states, batch) -> None:
    args = arguments(batch=batch, channels=50, states=states, dtype=dtype)
    for name in ("x", "dt", "B", "C", "z"):
        args[name] = args[name][:, 3]
    run(args, scales(50, mean=0.1), torch.int8, state_for(args), op=selective_scan_step)
    run(args, None, torch.float16, state_for(args), op=selective_scan_step)
    args["z"] = args["z_scale"] = None
    run(args, None, torch.float32, state_for(args), op=selective_scan_step)


@pytest.mark.parametrize("rank", [1, 16, 47, 48, 160, 272])
@pytest.mark.parametrize("batch", [1, 4, 9, 35])
@pytest.mark.parametrize("dt_scale", [None, "tensor", "channel"])
def test_dt_step(rank, batch, dt_scale) -> None:
    args = arguments(batch=batch, length=1, channels=50)
    for name in ("x", "B", "C", "z"):
        args[name] = args[name][:, 0]
    del args["dt"], args["dt_scale"]
    x, x_scale, *rest = args.values()
    scale = None if dt_scale is None else scales(50, mean=0.05) if dt_scale == "channel" else scales(mean=0.05)
    size = 1.0 / (rank**0.5 * 74 * 74) * 3
    d, weight = sliced(randint8(batch, rank)), randint8(50, rank)
    product = (d, torch.tensor(size, device="cuda"), weight, scales(50, mean=1.0), scale)
    for out_scale, out in ((scales(50, mean=0.1), torch.int8), (None, torch.float16)):
        state = state_for(args)
        bounds = {"flips": 1e-2, "error": 64.0}
        check(selective_scan_dt_step, x, x_scale, *product, *rest, out_scale, out, state, **bounds)
        # The same integers as by two ops, where the vectors are the same: exactly their result.
        dt = linear(*product[:4], None, None, scale, torch.float32 if scale is None else torch.int8)
        two, one = state.clone(), state.clone()
        expected = selective_scan_step(x, x_scale, dt, scale, *rest, out_scale, out, two)
        assert torch.equal(selective_scan_dt_step(x, x_scale, *product, *rest, out_scale, out, one), expected)
        assert torch.equal(one, two)


# Beyond 32 sequences, with 16 states: warps of 32 channels, six sequences under way, eight prepared at a time.
@pytest.mark.parametrize("dtype", [torch.int8, *FLOATS])
@pytest.mark.parametrize("batch", [33, 40, 64, 130])
@pytest.mark.parametrize("channels", [1, 50, 264])
def test_step_of_many(dtype, batch, channels) -> None:
    args = arguments(batch=batch, length=2, channels=channels, dtype=dtype)
    for name in ("x", "dt", "B", "C", "z"):
        args[name] = args[name][:, 1]
    run(args, scales(channels, mean=0.1), torch.int8, state_for(args), op=selective_scan_step)
    run(args, None, torch.float16, state_for(args), op=selective_scan_step)
    args["z"] = args["z_scale"] = None
    run(args, None, torch.float32, state_for(args), op=selective_scan_step)


@pytest.mark.parametrize("share", [1, 2, 5, 8, 21, 64])
@pytest.mark.parametrize(("batch", "channels", "rank"), [(3, 40, 16), (16, 300, 160), (65, 130, 48), (64, 264, 272)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_steps_have_the_same_bits(monkeypatch, share, batch, channels, rank, per_channel) -> None:
    """Whatever the number of sequences that a block takes; 0 is the kernel for few of them."""
    args = arguments(batch=batch, length=1, channels=channels, per_channel=per_channel)
    for name in ("x", "dt", "B", "C", "z"):
        args[name] = sliced(args[name][:, 0])
    x, x_scale, dt, dt_scale, *rest = args.values()
    size = torch.tensor(3.0 / (rank**0.5 * 74 * 74), device="cuda")
    product = (sliced(randint8(batch, rank)), size, randint8(channels, rank), scales(channels, mean=1.0), dt_scale)
    for out_scale, out in ((scales(channels, mean=0.1), torch.int8), (None, torch.bfloat16), (None, torch.float32)):
        start = state_for(args)
        for op, first in ((selective_scan_step, (dt, dt_scale)), (selective_scan_dt_step, product)):
            results = []
            for forced in (0, share):
                monkeypatch.setenv("QUAMBA_SCAN_STEP", str(forced))
                state = start.clone()
                results.append((op(x, x_scale, *first, *rest, out_scale, out, state), state))
            assert torch.equal(*(y for y, _ in results))
            assert torch.equal(*(state for _, state in results))
            assert not torch.equal(start, results[0][1])


def test_steps_continue_a_prefill() -> None:
    args = arguments(length=20)
    fixed = {name: args[name] for name in NAMES}
    whole = selective_scan(*fixed.values(), None, torch.float32, None)
    state = torch.zeros(2, 24, 16, device="cuda")
    cut = {n: v[:, :11] if n in ("x", "dt", "B", "C", "z") else v for n, v in fixed.items()}
    parts = [selective_scan(*cut.values(), None, torch.float32, state)]
    for t in range(11, 20):
        one = {n: v[:, t] if n in ("x", "dt", "B", "C", "z") else v for n, v in fixed.items()}
        parts.append(selective_scan_step(*one.values(), None, torch.float32, state)[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
