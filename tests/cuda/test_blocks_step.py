"""blocks_step for many sequences, a chain of kernels on a CUDA device, against the references on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quamba import ops
from quamba.ops.mixers_step import served
from tests.cuda.test_mixers_step import assert_equals_the_reference, moved
from tests.ops.test_mixer_step import arguments

SHAPE: dict[str, Any] = {"model": 64, "inner": 128, "size": 16, "rank": 16, "batch": 20}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "thirty-two tokens": {"batch": 32},
    "thirty-three tokens": {"batch": 33},
    "sixty-four tokens": {"batch": 64},
    "sixty-five tokens, which the chain does not take": {"batch": 65},
    "two hundred and one tokens, which the chain does not take": {"batch": 201},
    "rank 48": {"rank": 48, "batch": 64},
    "rank 208": {"rank": 208, "batch": 41},
    "model 16": {"model": 16, "batch": 64},
    "model 272": {"model": 272, "batch": 64},
    "inner 16": {"inner": 16, "batch": 64},
    "inner 320": {"inner": 320, "batch": 64},
    "the shape of mamba-130m": {"model": 768, "inner": 1536, "rank": 48, "batch": 64},
    "inner 5120": {"inner": 5120, "rank": 160, "batch": 34},
    "no rotation": {"rotate": False, "batch": 64},
    "no residual": {"residual": False, "batch": 64},
    "float dt": {"float_dt": True, "batch": 64},
    "no convolution bias": {"conv_bias": False, "batch": 64},
    "projection biases": {"biases": True, "batch": 64},
    "scales per channel": {"channels": True, "batch": 64},
    "one scale per weight": {"weight_tensor": True, "batch": 64},
    "bfloat16": {"dtype": torch.bfloat16, "biases": True, "batch": 64},
    "float16, residual in float32": {"dtype": torch.float16, "out_dtype": torch.float32, "batch": 64},
    "half precision out": {"out_dtype": torch.bfloat16, "batch": 64},
    "K 3, which the chain does not take": {"width": 3, "batch": 40},
    "norms, which the chain does not take": {"norms": "learned", "batch": 40},
}


def stepped(args: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, *block, out_dtype, conv, ssm = [v.clone() if isinstance(v, Tensor) else v for v in args]
    kept = ops.Block(*block)
    return ops.blocks_step(hidden, [kept.number], out_dtype, [conv], [ssm]), conv, ssm


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not served(torch.device("cuda"), d_model=64, d_inner=128, d_state=16, dt_rank=16, rotate=True):
        pytest.skip("the kernels need compute capability 9 and a build for it; other devices take the single ops")


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_block_equals_the_reference(name: str) -> None:
    assert_equals_the_reference(arguments(**(SHAPE | CHANGES[name])), stepped)


@torch.no_grad()
@pytest.mark.parametrize("batch", [17, 64, 100])
def test_steps_of_a_stack_in_a_graph(batch: int) -> None:
    """Kernels that start early are given what a block by itself, with the device idle before it, computes."""
    layers = [moved(arguments(**(SHAPE | {"batch": batch, "seed": seed}))) for seed in range(6)]
    kept = [ops.Block(*layer[1:-3]) for layer in layers]
    hidden, convs, ssms = layers[0][0], [layer[-2] for layer in layers], [layer[-1] for layer in layers]
    wanted_conv, wanted_ssm = [t.clone() for t in convs], [t.clone() for t in ssms]
    wanted = []
    for _ in range(4):
        stream = hidden
        for block, conv, ssm in zip(kept, wanted_conv, wanted_ssm, strict=True):
            stream = ops.blocks_step(stream, [block.number], torch.float32, [conv], [ssm])
            torch.cuda.synchronize()
        wanted.append(stream)
    numbers = [block.number for block in kept]
    start = [t.clone() for t in convs + ssms]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.blocks_step(hidden, numbers, torch.float32, convs, ssms)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.blocks_step(hidden, numbers, torch.float32, convs, ssms)
    for state, before in zip(convs + ssms, start, strict=True):
        state.copy_(before)
    for step in range(4):
        graph.replay()
        assert torch.equal(out, wanted[step])
    assert all(torch.equal(a, b) for a, b in zip(convs + ssms, wanted_conv + wanted_ssm, strict=True))
