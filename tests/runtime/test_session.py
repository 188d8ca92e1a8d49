"""Loops of one's own: prompts, steps, slots, states, threads."""

import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from quamba.errors import DtypeError, SizeError, UnsupportedModelError
from quamba.runtime import RuntimeConfig, Session
from tests.runtime.helpers import RECIPES, make
from tests.tiny import make_model, token_ids


def greedy(model: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
    """transformers' own greedy tokens, (B, count)."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    out: Tensor = model.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0, **options)
    return out[:, ids.shape[1] :]


def go_on(session: Session, logits: Tensor, count: int) -> Tensor:
    """The session's greedy tokens, (B, count)."""
    tokens = [logits.argmax(dim=-1)]
    while len(tokens) < count:
        tokens.append(session.decode(tokens[-1]).argmax(dim=-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["mamba-biased", "falcon_mamba", "jamba"])
def test_tokens_equal_generates(family: str, recipe: str) -> None:
    model = make(family, recipe)
    session = Session(model, max_batch=3)
    for seed in (0, 1):
        ids = token_ids(3, 6, seed=seed)
        assert torch.equal(go_on(session, session.prefill(ids), 6), greedy(model, ids, 6))
    session.reset()
    ids = token_ids(2, 4, seed=2)
    assert torch.equal(go_on(session, session.prefill(ids.to(torch.int32)), 4), greedy(model, ids, 4))


@pytest.mark.parametrize("family", ["mamba-biased", "falcon_mamba", "jamba"])
def test_padding_on_either_side(family: str) -> None:
    model = make(family)
    ids, lengths = token_ids(3, 7), [7, 2, 4]
    expected = [greedy(model, ids[row : row + 1, :length], 5)[0] for row, length in enumerate(lengths)]
    session = Session(model, max_batch=3)
    assert torch.equal(go_on(session, session.prefill(ids, lengths=lengths), 5), torch.stack(expected))
    assert torch.equal(go_on(session, session.prefill(ids, lengths=torch.tensor(lengths)), 5), torch.stack(expected))
    left = torch.stack([ids[row].roll(7 - length) for row, length in enumerate(lengths)])
    mask = torch.arange(7) >= 7 - torch.tensor(lengths)[:, None]
    assert torch.equal(go_on(session, session.prefill(left, mask), 5), torch.stack(expected))


def test_sequences_come_and_go() -> None:
    model = make("mamba")
    session = Session(model, max_batch=3)
    ids = token_ids(3, 6)
    tokens = session.prefill(ids).argmax(dim=-1)
    produced: list[list[int]] = [[int(t)] for t in tokens]
    for step in range(4):
        if step == 2:
            produced[1] = [int(session.admit(1, token_ids(9, seed=4)).argmax())]
            tokens = torch.tensor([row[-1] for row in produced])
        tokens = session.decode(tokens).argmax(dim=-1)
        for row, token in zip(produced, tokens, strict=True):
            row.append(int(token))
    assert produced[0] == greedy(model, ids[:1], 5)[0].tolist()
    assert produced[2] == greedy(model, ids[2:], 5)[0].tolist()
    assert produced[1] == greedy(model, token_ids(9, seed=4)[None], 3)[0].tolist()


def test_fewer_tokens_leave_the_other_slots_alone() -> None:
    model = make("mamba")
    session = Session(model, max_batch=3)
    logits = session.prefill(token_ids(3, 5))
    session.decode(logits[:2].argmax(dim=-1))
    expected = Session(model, max_batch=1)
    expected.prefill(token_ids(3, 5)[2:])
    found = session.export_state([2])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.export_state([0]).items())


def test_states_travel_to_another_session() -> None:
    model = make("mamba")
    first, second = Session(model, max_batch=2), Session(model, max_batch=4)
    ids = token_ids(2, 6)
    tokens = first.prefill(ids).argmax(dim=-1)
    second.prefill(token_ids(4, 3, seed=9))
    second.import_state(load(save(first.export_state([1, 0]))), [0, 3])
    found = second.decode(torch.stack([tokens[1], tokens[0], tokens[0], tokens[0]]))
    expected = first.decode(tokens)
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[3], expected[0])


def test_threads_share_a_session_and_a_model() -> None:
    model = make("mamba")
    ids = [token_ids(1, 6, seed=seed) for seed in range(4)]
    expected = [greedy(model, row, 12) for row in ids]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        own = Session(model)
        found[number] = go_on(own, own.prefill(ids[number]), 12)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in range(4))


def test_a_moved_model_is_noticed() -> None:
    model = make("mamba", dtype=torch.bfloat16)
    session = Session(model)
    ids = token_ids(1, 6)
    session.prefill(ids)
    model.to(torch.float32)
    assert torch.equal(go_on(session, session.prefill(ids), 4), greedy(model, ids, 4))
    model.to(torch.bfloat16)
    session.reset()
    assert not any(tensor.any() for tensor in session.export_state([0]).values())


def test_what_it_says_of_itself() -> None:
    session = Session(make("mamba"), max_batch=2, config=RuntimeConfig(graphs=False))
    session.decode(session.prefill(token_ids(2, 3)).argmax(dim=-1))
    assert session.ran == {"prefill eager": 1, "decode eager": 1}
    assert session.captured == []
    assert session.state_bytes == 2 * 3 * 48 * (4 + 4 * 5)
    assert session.device == torch.device("cpu")


def test_hybrids_have_no_slots() -> None:
    session = Session(make("jamba"), max_batch=2)
    for call in (
        lambda: session.admit(0, token_ids(3)),
        lambda: session.export_state([0]),
        lambda: session.import_state({}, [0]),
    ):
        with pytest.raises(UnsupportedModelError, match="attention layers keep the past of a whole batch"):
            call()
    with pytest.raises(SizeError, match="found 2 tokens for 0 sequences"):
        session.decode(token_ids(2))


def test_bad_arguments_raise() -> None:
    model = make("mamba")
    with pytest.raises(SizeError, match="found max_batch=0"):
        Session(model, max_batch=0)
    with pytest.raises(UnsupportedModelError, match="found a float model"):
        Session(make_model("mamba"))
    session, ids = Session(model, max_batch=2), token_ids(2, 4)
    for call, error, reason in (
        (lambda: session.prefill(token_ids(3, 4)), SizeError, r"input_ids of shape \(3, 4\); .*B from 1 to 2"),
        (lambda: session.prefill(ids[0]), SizeError, r"input_ids of shape \(4,\)"),
        (lambda: session.prefill(ids.float()), DtypeError, "input_ids of dtype torch.float32"),
        (lambda: session.prefill(ids, ids[:, 1:]), SizeError, "attention_mask of shape"),
        (lambda: session.prefill(ids, ids, lengths=[1, 2]), SizeError, "attention_mask and lengths"),
        (lambda: session.prefill(ids, lengths=[1, 5]), SizeError, r"lengths \[1, 5\]; expected 2 numbers from 1 to 4"),
        (lambda: session.prefill(ids, lengths=[0, 1]), SizeError, "lengths"),
        (lambda: session.decode(token_ids(3)), SizeError, r"tokens of shape \(3,\); expected \(B,\), B from 1 to 2"),
        (lambda: session.decode(ids), SizeError, "tokens of shape"),
        (lambda: session.decode(ids[:, 0].float()), DtypeError, "tokens of dtype"),
        (lambda: session.admit(2, ids[0]), SizeError, r"slots \[2\]; expected different ones from 0 to 1"),
        (lambda: session.admit(0, ids), SizeError, "B from 1 to 1"),
        (lambda: session.export_state([]), SizeError, "slots"),
        (lambda: session.export_state([0, 0]), SizeError, "slots"),
    ):
        with pytest.raises(error, match=reason):
            call()
