"""CUDA graphs change no bit: prefill, decode, generate(), streams, threads."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import quamba
from quamba import runtime
from quamba.runtime import RuntimeConfig, Session
from tests.test_quantize import make_model, tokens

EAGER = RuntimeConfig(graphs=False)
GRAPHS = RuntimeConfig(prefill_lengths=(8, 32), prefill_tokens=256, prefill_uses=1, prefill_graphs=2, decode_graphs=2)
KINDS = ("mamba-untied", "falcon")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


def make(kind: str = "mamba-untied", recipe: str = "quamba-c", dtype: torch.dtype = torch.float16) -> Any:
    return quamba.quantize(make_model(kind, dtype).cuda(), [tokens()], recipe)


def ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return tokens(rows=rows, length=length, seed=seed).cuda()


def same_states(a: Session, b: Session, slots: list[int]) -> bool:
    expected = b.export_state(slots)
    return all(torch.equal(tensor, expected[name]) for name, tensor in a.export_state(slots).items())


@pytest.mark.parametrize("recipe", ["quamba-c", "quamba", "naive", "dynamic", "mamba-had"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_change_no_bit(kind: str, recipe: str) -> None:
    model = make(kind, recipe)
    graphs, eager = Session(model, max_batch=5, config=GRAPHS), Session(model, max_batch=5, config=EAGER)
    for rows, length in ((5, 8), (5, 7), (2, 31), (1, 8), (3, 2), (5, 70), (5, 8)):
        assert torch.equal(graphs.prefill(ids(rows, length)), eager.prefill(ids(rows, length))), (rows, length)
        for step in range(3):
            chosen = ids(rows, 1, seed=step)[:, 0]
            assert torch.equal(graphs.decode(chosen), eager.decode(chosen)), (rows, length, step)
        assert same_states(graphs, eager, list(range(rows)))
    assert graphs.ran == {"prefill graph": 6, "prefill eager": 1, "decode graph": 21}
    # The least recently used went.
    assert len(graphs.captured) == 4


def test_tokens_that_come_at_the_same_place() -> None:
    model = make()
    graphs, eager = Session(model, max_batch=2, config=GRAPHS), Session(model, max_batch=2, config=EAGER)
    for session in (graphs, eager):
        session.prefill(ids(2, 9))
    chosen = [ids(2, 4, seed=n) for n in range(3)]
    for step in range(36):
        # Three places, of two strides, and new values in each of them: two are read in place by the end, one is copied.
        tokens = chosen[step % 3][:, 0] if step % 3 else chosen[0][:, :1].contiguous()[:, 0]
        chosen[step % 3].copy_((chosen[step % 3] + 7 * step + 1) % 50)
        assert torch.equal(graphs.decode(tokens), eager.decode(tokens)), step
    assert same_states(graphs, eager, [0, 1])
    assert graphs.captured == [("decode", 2), ("prefill", 2, 32)]


def test_slots() -> None:
    model = make()
    graphs, eager = Session(model, max_batch=4, config=GRAPHS), Session(model, max_batch=4, config=EAGER)
    for session in (graphs, eager):
        session.prefill(ids(4, 9))
    for slot, length in ((2, 5), (0, 8), (3, 40), (2, 7)):
        prompt = ids(1, length, seed=slot)[0]
        assert torch.equal(graphs.admit(slot, prompt), eager.admit(slot, prompt))
        chosen = ids(4, 1, seed=slot)[:, 0]
        assert torch.equal(graphs.decode(chosen), eager.decode(chosen))
    assert same_states(graphs, eager, [0, 1, 2, 3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [False, True])
def test_generate_gives_the_eager_tokens(kind: str, sampling: bool) -> None:
    """Those of the runtime without graphs. transformers' own loop rounds the final norm to the model's dtype before the
    head, which one launch does without: now and then a token comes out otherwise there."""
    model = make(kind)
    options = {**GREEDY, "do_sample": sampling}
    prompts = ids(3, 11)
    mask = (torch.arange(11) >= torch.tensor([[0], [4], [10]])).long().cuda()
    for attention_mask in (torch.ones_like(mask), mask):
        found = []
        for config in (RuntimeConfig(graphs=False), RuntimeConfig(prefill_uses=1)):
            runtime.configure(model, config)
            torch.manual_seed(0)
            found.append(model.generate(prompts, attention_mask=attention_mask, **options))
        assert torch.equal(*found)
        assert runtime.describe(model).mode == "CUDA graphs"
        assert runtime.describe(model).last == {"prefill graph": 1, "decode graph": 11}


def test_generate_uses_graphs_unasked() -> None:
    model = make()
    # Random weights may well begin with the token that ends a text.
    model.generate(ids(1, 5), **GREEDY, min_new_tokens=12)
    described = runtime.describe(model)
    assert described.last["decode graph"] == 11
    assert ("decode", 1) in described.captured
    model.generate(ids(1, 5), num_beams=3, **GREEDY)
    assert any("beam search" in reason for reason in runtime.describe(model).last)


def test_other_streams() -> None:
    model, eager = make(), None
    session = Session(model, max_batch=2, config=GRAPHS)
    eager = Session(model, max_batch=2, config=EAGER)
    chosen = [ids(2, 1, seed=n)[:, 0] for n in range(6)]
    expected = [eager.prefill(ids(2, 8))] + [eager.decode(t) for t in chosen]
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    torch.cuda.synchronize()
    for n, stream in enumerate(streams * 3):
        if n == 7:
            break
        with torch.cuda.stream(stream):
            logits = session.prefill(ids(2, 8)) if n == 0 else session.decode(chosen[n - 1])
            found.append(logits.clone())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_and_models() -> None:
    models = [make(), make("falcon")]
    prompts = [ids(1 + n % 3, 6, seed=n) for n in range(6)]
    for model in models:
        runtime.configure(model, RuntimeConfig(generate_on=()))
    expected = [models[n % 2].generate(prompt, **GREEDY) for n, prompt in enumerate(prompts)]
    for model in models:
        runtime.configure(model, RuntimeConfig())
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                found[number] = models[number % 2].generate(prompts[number], **GREEDY)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in range(6))


def test_a_hybrid() -> None:
    model = make("jamba")
    session = Session(model, max_batch=2)
    prompts = ids(2, 6)
    found = [session.prefill(prompts).argmax(dim=-1)]
    for _ in range(4):
        found.append(session.decode(found[-1]).argmax(dim=-1))
    expected = model.generate(prompts, **{**GREEDY, "max_new_tokens": 5})
    assert torch.equal(torch.stack(found, dim=1), expected[:, 6:])
    assert runtime.describe(model).mode == "eager"
