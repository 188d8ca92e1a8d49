"""blocks_prefill on a CUDA device: the single ops' results bit for bit, and the CPU's."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import quamba
from quamba import ops
from quamba.models.adapter import find_adapter, quantized_layers
from quamba.ops.mixers_step import served
from tests.cuda.test_mixers_step import moved
from tests.ops.test_block import BLOCK
from tests.ops.test_blocks_prefill import CHANGES, NAMES, arguments, op_by_op, together
from tests.ops.test_mixers_step import KINDS, stack
from tests.test_quantize import make_model, tokens

SHAPE = {"model": 768, "inner": 1536, "size": 16, "rank": 48, "dtype": torch.float16, "wide": torch.float16}
WIDE: dict[str, dict[str, Any]] = {
    **{name: change for name, change in CHANGES.items() if change.get("dtype") is not torch.float64},
    "the shape of mamba-130m": SHAPE | {"length": 77},
    "the shape of mamba-130m, long": SHAPE | {"length": 600, "batch": 1, "channels": True},
    "the shape of mamba-130m, many rows": SHAPE | {"length": 700, "batch": 3, "mask": torch.int64},
}


@torch.no_grad()
@pytest.mark.parametrize("name", WIDE)
def test_equals_the_single_ops(name: str) -> None:
    args = arguments(**WIDE[name])
    first, second = moved(args), moved(args)
    out, expected = together(first), op_by_op(second)
    assert out.dtype == args[NAMES.index("out_dtype")]
    assert out.is_contiguous()
    for found, wanted in zip((out, *first), (expected, *second), strict=True):
        assert torch.equal(found, wanted) if isinstance(found, Tensor) else found == wanted or found is wanted
    on_cpu = together(args)
    if out.numel() > 0:
        difference = (out.cpu().double() - on_cpu.double()).abs()
        assert float((difference > 0.03 * max(1.0, float(on_cpu.abs().max()))).double().mean()) <= 0.01


@torch.no_grad()
def test_strided_hidden_states_and_states() -> None:
    args = arguments(mask=torch.bool, model=64, inner=128)
    expected = moved(args)
    out = together(expected)
    for name in ("hidden", "conv_state", "ssm_state"):
        index = NAMES.index(name)
        fresh = moved(args)
        spread = torch.zeros((*args[index].shape, 2), dtype=args[index].dtype, device="cuda")
        spread[..., 0] = fresh[index]
        fresh[index] = spread[..., 0]
        assert torch.equal(together(fresh), out)
        assert torch.equal(spread[..., 0], expected[index])
        assert not spread[..., 1].any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba-untied", "falcon", "jamba"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("cache", [False, True])
def test_models_take_it(kind: str, dtype: torch.dtype, cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = quamba.quantize(make_model(kind, dtype).cuda(), [tokens()], "quamba-c")
    ids = tokens(rows=3, length=21, seed=4).cuda()
    mask = (torch.arange(21) >= torch.tensor([[0], [5], [1]])).long().cuda()
    calls = []
    original = ops.blocks_prefill

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(ops, "blocks_prefill", counted)
    found = model(ids, attention_mask=mask, use_cache=cache).logits
    mixers = [mixer for _, mixer in quantized_layers(find_adapter(model), model)]
    assert len(calls) == len(mixers)
    for mixer in mixers:
        mixer.block = None
    assert torch.equal(model(ids, attention_mask=mask, use_cache=cache).logits, found)
    assert len(calls) == len(mixers)


@torch.no_grad()
def test_kept_blocks_step_like_their_arguments() -> None:
    if not served(torch.device("cuda"), d_model=64, d_inner=128, d_state=16, dt_rank=4, rotate=True):
        pytest.skip("no kernel for a step through a stack on this device")
    args, steps = stack(KINDS, model=64, inner=128, size=16, rank=4)
    first, second = moved(args), moved(args)
    blocks = [ops.Block(*moved(list(step[BLOCK]))) for step in steps]
    numbers = [block.number for block in blocks]
    out = ops.blocks_step(first[0], numbers, *first[4:])
    assert torch.equal(out, ops.mixers_step(*second))
    for found, wanted in zip((*first[-2], *first[-1]), (*second[-2], *second[-1]), strict=True):
        assert torch.equal(found, wanted)
    del blocks
    gc.collect()
    with pytest.raises(RuntimeError, match="found no block number"):
        ops.blocks_step(first[0], numbers, *first[4:])
