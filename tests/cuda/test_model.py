"""Whole quantized models on a CUDA device against the same models on the CPU."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import quamba
from tests.test_quantize import CONFIGS, make_model, relative_error, tokens
from tests.tiny import SAVED_RECIPES

RECIPES = [name for name in SAVED_RECIPES if name != "float"]


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_gives_the_cpu_models_logits(kind: str, recipe: str) -> None:
    on_cpu = quamba.quantize(make_model(kind), [tokens()], recipe)
    on_cuda = copy.deepcopy(on_cpu).cuda()
    ids = tokens(rows=3, length=33, seed=1)
    assert relative_error(logits(on_cuda, ids), logits(on_cpu, ids)) < 0.02


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantizing_on_the_device_gives_the_scales_of_the_cpu(kind: str) -> None:
    on_cpu = quamba.quantize(make_model(kind), [tokens()])
    on_cuda = quamba.quantize(make_model(kind).cuda(), [tokens()])
    expected = on_cpu.state_dict()
    for name, tensor in on_cuda.state_dict().items():
        assert tensor.is_cuda
        if name.endswith("_scale"):
            torch.testing.assert_close(tensor.cpu(), expected[name], rtol=1e-3, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["mamba-untied", "falcon", "jamba"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "kernel"), [(2, None), (12, None), (12, "ring"), (40, "ring")])
def test_steps_equal_prefill(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, rows: int, kernel: str | None
) -> None:
    """Few sequences take a step in one launch, more the single ops, which linear's ring fuses."""
    if kernel is not None:
        monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    model = quamba.quantize(make_model(kind, dtype).cuda(), [tokens()])
    ids = tokens(rows=rows, length=12, seed=2).cuda()
    whole = logits(model, ids)
    name = "past_key_values" if kind == "jamba" else "cache_params"
    with torch.no_grad():
        out = model(ids[:, :8], use_cache=True)
        steps = [out.logits.float().cpu()]
        for t in range(8, 12):
            out = model(ids[:, t : t + 1], use_cache=True, **{name: out[name]})
            steps.append(out.logits.float().cpu())
    assert relative_error(torch.cat(steps, dim=1), whole) < 0.03


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation_with_left_padding(kind: str) -> None:
    model = quamba.quantize(make_model(kind).cuda(), [tokens()])
    ids = tokens(rows=1, length=9, seed=3)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1).cuda()
    mask = (torch.arange(13) >= 4).long()[None].cuda()
    plain = model.generate(ids.cuda(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    beside = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(plain[:, 9:], beside[:, 13:])
