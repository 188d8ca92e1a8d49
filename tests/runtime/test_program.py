"""The model as the runtime runs it against the model's own forward, bit for bit."""

import pytest
import torch

from quamba import ops
from quamba.errors import UnsupportedModelError
from quamba.models import find_adapter
from quamba.nn import stack
from quamba.runtime.program import Program
from quamba.runtime.states import States
from tests.models.mamba_ssm_stand_in import MambaConfig, MambaLMHeadModel
from tests.runtime.helpers import RECIPES, STACKS, make
from tests.tiny import make_model, randomize, token_ids


def fresh(program: Program, slots: int) -> States:
    return States(program.layers, slots, program.device)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", STACKS)
def test_prefill_and_steps_equal_the_models_forward(family: str, recipe: str, dtype: torch.dtype) -> None:
    model = make(family, recipe, dtype=dtype)
    program, ids = Program(model), token_ids(3, 9)
    states = fresh(program, 3)
    found = [program.prefill(ids[:, :6], None, states.first(3))]
    found += [program.step(ids[:, t], states.first(3)) for t in range(6, 9)]
    out = model(ids[:, :6], use_cache=True)
    expected = [out.logits[:, -1]]
    for t in range(6, 9):
        out = model(ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
        expected.append(out.logits[:, -1])
    assert torch.equal(torch.stack(found), torch.stack(expected))


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", STACKS)
def test_padding_on_the_left_changes_no_bit(family: str, recipe: str) -> None:
    model = make(family, recipe)
    program, ids = Program(model), token_ids(1, 13)
    plain, padded = fresh(program, 1), fresh(program, 1)
    expected = program.prefill(ids, None, plain.first(1))
    filled = torch.cat([torch.full((1, 19), 5), ids], dim=1)
    mask = (torch.arange(32) >= 19).long()[None]
    found = program.prefill(filled, mask, padded.first(1))
    if recipe == "float":
        # Float products are summed in another order.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(padded.tensors, plain.tensors, strict=True))


def apart_and_together(
    model: torch.nn.Module, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Program, Program, list[int]]:
    """A program that runs mixer by mixer, one that runs all by a function of `stack`, and that one's calls."""
    one_by_one, whole, calls = Program(model), getattr(stack, name), []
    monkeypatch.setattr(stack, "serves", lambda mixers, device: True)
    monkeypatch.setattr(stack, name, lambda *args: calls.append(1) or whole(*args))
    return one_by_one, Program(model), calls


@torch.no_grad()
def test_a_stack_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make("mamba-biased", dtype=torch.bfloat16), token_ids(2, 6)
    one_by_one, together, calls = apart_and_together(model, "run", monkeypatch)
    a, b = fresh(one_by_one, 2), fresh(together, 2)
    for t in range(6):
        assert torch.equal(together.step(ids[:, t], b.first(2)), one_by_one.step(ids[:, t], a.first(2)))
    with ops.reference():
        together.step(ids[:, 0], b.first(2))
    many = 17
    assert not stack.takes(list(together.layers.values()), many)
    together.step(token_ids(many), fresh(together, many).first(many))
    assert len(calls) == 6


@torch.no_grad()
def test_prompts_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make("mamba-biased", dtype=torch.bfloat16), token_ids(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    one_by_one, together, calls = apart_and_together(model, "prefill", monkeypatch)
    a, b = fresh(one_by_one, 2), fresh(together, 2)
    for length, given in ((7, None), (7, mask), (2, None), (1, mask[:, -1:]), (1, None)):
        found = together.prefill(ids[:, :length], given, b.first(2))
        assert torch.equal(found, one_by_one.prefill(ids[:, :length], given, a.first(2)))
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    with ops.reference():
        together.prefill(ids, None, b.first(2))
    assert len(calls) == 4


@torch.no_grad()
@pytest.mark.parametrize("wide", [True, False])
def test_mamba_ssm_models(wide: bool) -> None:
    from quamba import quantize

    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(residual_in_fp32=wide)).eval()
    randomize(model, seed=1)
    quantize(model, [token_ids(8, 24, seed=5)])
    program, ids = Program(model), token_ids(2, 7)
    states = fresh(program, 2)
    found = program.prefill(ids, None, states.first(2))
    torch.testing.assert_close(found, model(ids).logits[:, -1], rtol=0, atol=0)


def test_changes_of_the_model_are_seen() -> None:
    model = make("mamba")
    program = Program(model)
    assert program.describes(model)
    mixer = find_adapter(model).shell_at(model, 1).mixer
    mixer.A = mixer.A.clone()
    assert not program.describes(model)
    program = Program(model)
    model.backbone.norm_f = torch.nn.Identity()
    assert not program.describes(model)
    program = Program(model)
    layers = model.backbone.layers
    layers.append(layers[0])
    assert not program.describes(model)
    del layers[-1]
    assert program.describes(model)
    model.backbone.layers = torch.nn.ModuleList(layers)
    assert not program.describes(model)
    assert not Program(model).describes(make("mamba"))


def test_models_that_it_does_not_run_raise() -> None:
    with pytest.raises(UnsupportedModelError, match="found a float model; expected one that"):
        Program(make_model("mamba"))
    with pytest.raises(UnsupportedModelError, match="layers besides its Mamba blocks"):
        Program(make("jamba"))
    model = make("mamba")
    model.backbone.norm_f.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"found a model on \['cpu', 'meta'\]; expected one device"):
        Program(model)
