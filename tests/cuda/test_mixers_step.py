"""mixers_step and mixer_step on a CUDA device against the references on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quamba import ops
from quamba.ops.mixers_step import served
from tests.ops.test_mixer_step import NAMES, arguments, assert_same_step
from tests.ops.test_mixers_step import KINDS, run, stack

SHAPE = {"model": 64, "inner": 128, "size": 16, "rank": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"batch": 1},
    "three tokens": {"batch": 3},
    "eight tokens": {"batch": 8},
    "eleven tokens": {"batch": 11},
    "sixteen tokens": {"batch": 16},
    "forty-one tokens": {"batch": 41},
    "K 1": {"width": 1},
    "K 2": {"width": 2},
    "K 3": {"width": 3},
    "K 7": {"width": 7},
    "N 4": {"size": 4},
    "N 20": {"size": 20},
    "N 32": {"size": 32},
    "rank 28": {"rank": 28},
    "rank 256": {"rank": 256},
    "model 16": {"model": 16},
    "model 2064": {"model": 2064},
    "inner 16": {"inner": 16},
    "more tokens than thread blocks": {"inner": 16, "batch": 7},
    "inner 48, without rotation": {"inner": 48, "rotate": False},
    "inner 192": {"inner": 192},
    "inner 320": {"inner": 320},
    "inner 5120": {"inner": 5120, "batch": 1},
    "inner 8192, seven tokens": {"inner": 8192, "batch": 7, "rank": 256},
    "the shape of mamba-130m": {"model": 768, "inner": 1536, "rank": 48, "batch": 1},
    "the shape of mamba-130m, four tokens": {"model": 768, "inner": 1536, "rank": 48, "batch": 4},
    "the shape of mamba-130m, sixteen tokens": {"model": 768, "inner": 1536, "rank": 48, "batch": 16},
    "the shape of mamba-2.8b": {"model": 2560, "inner": 5120, "rank": 160, "batch": 1},
    "the shape of mamba-2.8b, sixteen tokens": {"model": 2560, "inner": 5120, "rank": 160, "batch": 16},
    "inner 5120, sixteen tokens": {"inner": 5120, "batch": 16, "rank": 160},
    "inner 8192, sixteen tokens": {"inner": 8192, "batch": 16, "rank": 256},
    "no rotation": {"rotate": False},
    "no rotation, five tokens": {"rotate": False, "batch": 5},
    "no residual": {"residual": False},
    "learned norms": {"norms": "learned"},
    "weightless norms": {"norms": "weightless", "batch": 5},
    "float dt": {"float_dt": True},
    "no convolution bias": {"conv_bias": False},
    "projection biases": {"biases": True},
    "scales per channel": {"channels": True},
    "scales per channel, no rotation, float dt": {"channels": True, "rotate": False, "float_dt": True},
    "one scale per weight": {"weight_tensor": True},
    "bfloat16": {"dtype": torch.bfloat16, "biases": True, "norms": "learned"},
    "float16, residual in float32": {"dtype": torch.float16, "out_dtype": torch.float32},
    "half precision out": {"out_dtype": torch.bfloat16},
}


def moved(args: list[Any]) -> list[Any]:
    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(v) for v in value]
        return value.cuda() if isinstance(value, Tensor) else value

    return [move(value) for value in args]


def back(result: tuple[Tensor, Any, Any]) -> tuple[Tensor, Any, Any]:
    return result[0].cpu(), result[1].cpu(), result[2].cpu()


def stepped(args: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    fresh = [v.clone() if isinstance(v, Tensor) else v for v in args]
    return ops.mixer_step(*fresh), fresh[-2], fresh[-1]


def assert_equals_the_reference(args: list[Any], step: Callable[[list[Any]], tuple[Tensor, Any, Any]]) -> None:
    """A step on the device against the same one by the references on the CPU."""
    with ops.reference():
        expected = step(args)
    found = step(moved(args))
    assert found[0].dtype is expected[0].dtype
    assert_same_step(back(found), expected)


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not served(torch.device("cuda"), d_model=64, d_inner=128, d_state=16, dt_rank=4, rotate=True):
        pytest.skip("the kernel needs compute capability 9 and a build for it; other devices take the single ops")


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_block_equals_the_reference(name: str) -> None:
    assert_equals_the_reference(arguments(**(SHAPE | CHANGES[name])), stepped)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if "batch" not in change])
def test_many_sequences_equal_the_reference(name: str) -> None:
    assert_equals_the_reference(arguments(**(SHAPE | CHANGES[name] | {"batch": 13})), stepped)


@torch.no_grad()
def test_bytes_that_look_as_if_they_were_not_there() -> None:
    # kThere of csrc/include/quamba/mixers_step_tags.cuh: the kernel for many waits for words that are another one.
    bytes_ = torch.tensor([0x35CA6B92], dtype=torch.int64).to(torch.int32).view(torch.int8).float()
    args = arguments(**SHAPE, batch=13)
    hidden, norm_weight = NAMES.index("hidden"), NAMES.index("norm_weight")
    args[hidden] = torch.ones_like(args[hidden])
    args[norm_weight] = (args[NAMES.index("u_scale")] * bytes_).repeat(SHAPE["model"] // 4).to(args[norm_weight].dtype)
    assert_equals_the_reference(args, stepped)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9, 16, 33])
@pytest.mark.parametrize("same", [True, False])
def test_a_stack_equals_its_blocks(batch: int, same: bool) -> None:
    kinds = [{}] * 7 if same else [{}, {}, *KINDS[1:], {}]
    args, blocks = stack(kinds, **SHAPE, batch=batch)
    out, conv, ssm = run(moved(args))
    hidden = blocks[0][0].cuda()
    for block, one_conv, one_ssm in zip(blocks, conv, ssm, strict=True):
        hidden, wanted_conv, wanted_ssm = stepped([hidden, *moved(block[1:])])
        assert torch.equal(one_conv, wanted_conv)
        assert torch.equal(one_ssm, wanted_ssm)
    assert torch.equal(out, hidden)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 5, 16])
@pytest.mark.parametrize("cluster", ["2", "4"])
@pytest.mark.parametrize("inner", [1024, 1536, 3072, 5120])
def test_clusters_that_share_a_transform(inner: int, cluster: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = moved(stack([{}] * 5, **(SHAPE | {"inner": inner}), batch=batch)[0])
    alone = run(args)
    monkeypatch.setenv("QUAMBA_STEP_CLUSTER", cluster)
    for _ in range(3):
        shared = run(args)
        assert torch.equal(shared[0], alone[0])
        assert all(torch.equal(a, b) for a, b in zip(shared[1] + shared[2], alone[1] + alone[2], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("shape", ["the shape of mamba-130m", "the shape of mamba-2.8b"])
def test_a_shape_that_is_known_changes_no_bit(shape: str) -> None:
    """One sequence takes the code for that shape, two the code for all."""
    args = moved(stack([{}] * 6, **(SHAPE | CHANGES[shape] | {"batch": 2}), out_dtype=torch.float32)[0])
    both = run(args)
    for sequence in range(2):
        one = slice(sequence, sequence + 1)
        mine = [args[0][one], *args[1:-2], [t[one] for t in args[-2]], [t[one] for t in args[-1]]]
        for _ in range(3):
            alone = run(mine)
            assert torch.equal(alone[0], both[0][one])
            assert all(torch.equal(a, b[one]) for a, b in zip(alone[1] + alone[2], both[1] + both[2], strict=True))


@torch.no_grad()
def test_a_shape_that_is_known_for_sixteen_changes_no_bit() -> None:
    """Sixteen sequences take the code for that shape, fifteen the code for all."""
    args = moved(
        stack([{}] * 5, **(SHAPE | CHANGES["the shape of mamba-2.8b, sixteen tokens"]), out_dtype=torch.float32)[0]
    )
    few = slice(0, 15)
    fewer = run([args[0][few], *args[1:-2], [t[few] for t in args[-2]], [t[few] for t in args[-1]]])
    for _ in range(3):
        all_sequences = run(args)
        assert torch.equal(all_sequences[0][few], fewer[0])
        assert all(
            torch.equal(a[few], b)
            for a, b in zip(all_sequences[1] + all_sequences[2], fewer[1] + fewer[2], strict=True)
        )


@torch.no_grad()
def test_more_blocks_than_a_launch_takes() -> None:
    args, _ = stack([{}] * 101, **SHAPE, batch=2)
    out, conv, ssm = run(moved(args))
    again = run(moved(args))
    assert torch.equal(out, again[0])
    assert all(torch.equal(a, b) for a, b in zip(conv + ssm, again[1] + again[2], strict=True))
    expected = run(args)
    assert torch.equal(conv[0].cpu(), expected[1][0])
    assert out.isfinite().all()


@torch.no_grad()
def test_many_steps_in_a_graph_and_beside_another_stream() -> None:
    args, _ = stack([{}] * 5, **SHAPE, batch=2)
    args = moved(args)
    wanted = []
    mine = [*args[:-2], [t.clone() for t in args[-2]], [t.clone() for t in args[-1]]]
    for _ in range(20):
        wanted.append(ops.mixers_step(*mine))
    live = [*args[:-2], [t.clone() for t in args[-2]], [t.clone() for t in args[-1]]]
    start = [t.clone() for t in live[-2] + live[-1]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.mixers_step(*live)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.mixers_step(*live)
    for state, kept in zip(live[-2] + live[-1], start, strict=True):
        state.copy_(kept)
    other = moved(stack([{}] * 9, **SHAPE, batch=1)[0])
    for step in range(20):
        with torch.cuda.stream(stream):
            run(other)
        graph.replay()
        assert torch.equal(out, wanted[step])


@torch.no_grad()
def test_strides() -> None:
    args = moved(arguments(**SHAPE, batch=3))
    plain = stepped(args)
    batch, model = args[0].shape
    wide = torch.zeros(batch, 2 * model + 1, device="cuda")
    wide[:, 1 : 1 + model] = args[0]
    assert torch.equal(stepped([wide[:, 1 : 1 + model], *args[1:]])[0], plain[0])
    conv, ssm = (torch.zeros(2 * batch, *state.shape[1:], dtype=state.dtype, device="cuda") for state in args[-2:])
    conv[::2], ssm[::2] = args[-2], args[-1]
    assert torch.equal(ops.mixer_step(*args[:-2], conv[::2], ssm[::2]), plain[0])
    assert torch.equal(conv[::2], plain[1])
    assert torch.equal(ssm[::2], plain[2])
    assert not conv[1::2].any()
    assert not ssm[1::2].any()


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        ({"model": 24}, "E=24"),
        ({"size": 5}, "N=5"),
        ({"rank": 3}, "R=3"),
        ({"inner": 48}, "D=48"),
        ({"inner": 448}, "D=448"),
        ({}, "in_weight"),
    ],
)
def test_what_the_kernel_does_not_take_raises(shape: dict[str, Any], wrong: str) -> None:
    args = moved(arguments(**(SHAPE | shape)))
    if not shape:
        args[4] = args[4].float()
    with pytest.raises(RuntimeError, match=wrong):
        ops.mixer_step(*args)


def test_served() -> None:
    device = torch.device("cuda")
    sizes = {"d_model": 2560, "d_inner": 5120, "d_state": 16, "dt_rank": 160}
    assert served(device, **sizes, rotate=True)
    for change in ({"d_model": 2564}, {"d_inner": 16384}, {"d_inner": 5130}, {"d_state": 6}, {"dt_rank": 6}):
        assert not served(device, **(sizes | change), rotate=True)
    assert not served(device, **(sizes | {"d_inner": 1664}), rotate=True)
    assert served(device, **(sizes | {"d_inner": 1664}), rotate=False)
