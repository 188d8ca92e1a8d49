import pytest
import torch

from quamba.ops import causal_conv1d, causal_conv1d_step
from tests.cuda.compare import FLOATS, assert_close, check, randint8, randn, scales, sliced, strided


def arguments(dtype, batch=2, length=37, channels=72, width=4, weight=torch.int8, per_channel=True):
    x = randint8(batch, length, channels) if dtype == torch.int8 else randn(batch, length, channels, dtype=dtype)
    shape = (channels,) if per_channel else ()
    taps = randint8(channels, width) if weight == torch.int8 else randn(channels, width, dtype=weight)
    return [
        x,
        scales(*shape) if dtype == torch.int8 else None,
        taps,
        scales(*shape, mean=0.01) if weight == torch.int8 else None,
        randn(channels),
    ]


def state_for(x, width):
    shape = (x.shape[0], x.shape[-1], width)
    return randint8(*shape) if x.dtype == torch.int8 else randn(*shape, dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.int8, *FLOATS])
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
@pytest.mark.parametrize("per_channel", [False, True])
def test_types(dtype, out, per_channel) -> None:
    args = arguments(dtype, per_channel=per_channel)
    scale = (scales(72) if per_channel else scales()) if out == torch.int8 else None
    check(causal_conv1d, *args, scale, out, None, None, flips=1e-3, error=8.0)


@pytest.mark.parametrize("weight", [torch.int8, *FLOATS])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_widths(weight, width) -> None:
    args = arguments(torch.int8, width=width, weight=weight)
    check(causal_conv1d, *args, None, torch.float32, None, state_for(args[0], width), error=8.0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 15, 16, 17, 151])
@pytest.mark.parametrize("channels", [1, 6, 128, 516])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_shapes(length, channels, dtype) -> None:
    args = arguments(dtype, batch=3, length=length, channels=channels)
    mask = torch.rand(3, length, device="cuda") < 0.7
    check(causal_conv1d, *args, scales(channels), torch.int8, mask, state_for(args[0], 4), flips=1e-3)
    check(causal_conv1d, *args, None, torch.float32, mask.long(), None, error=8.0)


@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 2048, 5120), (3, 1001, 4100), (2, 8003, 1536)])
@pytest.mark.parametrize("masked", [False, True])
def test_long(batch, length, channels, masked) -> None:
    """More steps than all threads take at a time."""
    args = arguments(torch.int8, batch=batch, length=length, channels=channels)
    mask = torch.rand(batch, length, device="cuda") < 0.7 if masked else None
    state = state_for(args[0], 4)
    check(causal_conv1d, *args, scales(channels), torch.int8, mask, state, flips=1e-3)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 37])
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
@pytest.mark.parametrize("masked", [False, True])
def test_states_of_other_strides(length, out, masked) -> None:
    args = arguments(torch.int8, batch=3, length=length, channels=132)
    mask = torch.rand(3, length, device="cuda") < 0.7 if masked else None
    actual_state = randint8(3, 4, 132).transpose(1, 2)
    expected_state = actual_state.clone()
    args += [scales(132) if out == torch.int8 else None, out, mask]
    actual, expected = causal_conv1d(*args, actual_state), causal_conv1d.reference(*args, expected_state)
    assert_close(actual, expected, flips=1e-3, error=8.0)
    assert torch.equal(actual_state, expected_state)


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_extremes(value, scale) -> None:
    """The largest sums there are, far out on either side of SiLU, and results beyond their range."""
    x = torch.full((1, 40, 64), -128, dtype=torch.int8, device="cuda")
    taps = torch.full((64, 4), value, dtype=torch.int8, device="cuda")
    args = (torch.tensor(scale, device="cuda"), taps, torch.tensor(1.0, device="cuda"), randn(64))
    check(causal_conv1d, x, *args, torch.tensor(0.05, device="cuda"), torch.int8, None, None, flips=1e-3)
    check(causal_conv1d, x, *args, None, torch.float32, None, None, error=8.0)


def test_no_bias() -> None:
    args = arguments(torch.int8)
    args[4] = None
    check(causal_conv1d, *args, None, torch.float16, None, None, error=8.0)


@pytest.mark.parametrize("view", [strided, sliced, lambda x: x.transpose(0, 1)])
def test_strides(view) -> None:
    args = arguments(torch.int8, batch=5, length=33)
    x = view(args[0])
    check(causal_conv1d, x, *args[1:], scales(), torch.int8, None, state_for(x, 4), flips=1e-3)


@pytest.mark.parametrize("dtype", [torch.int8, *FLOATS])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_step(dtype, width) -> None:
    args = arguments(dtype, length=1, width=width)
    x = args[0][:, 0]
    for out, scale in ((torch.int8, scales(72)), (torch.float32, None)):
        check(causal_conv1d_step, x, *args[1:], scale, out, state_for(x, width), flips=1e-3, error=8.0)


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("channels", [4, 70, 516])
@pytest.mark.parametrize("view", [None, sliced, strided])
def test_step_of_many(batch, channels, view) -> None:
    x = randint8(batch, channels)
    args = (scales(channels), randint8(channels, 4), scales(channels), randn(channels, dtype=torch.float16))
    state = randint8(batch, channels, 4)
    for out, scale in ((torch.int8, scales(channels)), (torch.float16, None)):
        check(causal_conv1d_step, x if view is None else view(x), *args, scale, out, state, flips=1e-3, error=8.0)


def test_steps_continue_a_prefill() -> None:
    args = arguments(torch.int8, length=20)
    whole = causal_conv1d(*args, None, torch.float32, None, None)
    state = torch.zeros(2, 72, 4, dtype=torch.int8, device="cuda")
    first = causal_conv1d(args[0][:, :11], *args[1:], None, torch.float32, None, state)
    steps = [causal_conv1d_step(args[0][:, t], *args[1:], None, torch.float32, state) for t in range(11, 20)]
    assert torch.equal(torch.cat([first, torch.stack(steps, 1)], 1), whole)
