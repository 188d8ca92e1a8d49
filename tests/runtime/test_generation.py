"""model.generate() through the runtime gives transformers' own results, whatever is asked of it."""

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import quamba
from quamba import ops, runtime
from quamba.runtime import RuntimeConfig
from quamba.runtime.engine import Engine
from quamba.runtime.owner import owner_of
from tests.runtime.helpers import RECIPES, STACKS, make, with_calls_for_graphs
from tests.tiny import token_ids

ON_CPU = RuntimeConfig(generate_on=("cpu",), prefill_uses=1, prefill_lengths=(8, 16))
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


@pytest.fixture(params=["states", "graphs"], autouse=True)
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Engines as on a CPU, and as on CUDA with calls in place of graphs."""
    if request.param == "graphs":
        monkeypatch.setattr(
            "quamba.runtime.owner.Engine", lambda *args: with_calls_for_graphs(Engine(*args)), raising=True
        )
    return str(request.param)


def both(model: Any, ids: Tensor, **options: Any) -> tuple[Any, Any]:
    """What generate() gives without and with the runtime, from one seed."""
    found = []
    options = {"attention_mask": torch.ones_like(ids), **GREEDY, **options}
    for config in (RuntimeConfig(), ON_CPU):
        runtime.configure(model, config)
        torch.manual_seed(0)
        found.append(model.generate(ids, **options))
    return found[0], found[1]


def last(model: Any) -> dict[str, int]:
    return runtime.describe(model).last


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", STACKS)
def test_greedy(family: str, recipe: str, engines: str) -> None:
    model = make(family, recipe)
    expected, found = both(model, token_ids(3, 7))
    if recipe != "float" or engines == "states":
        assert torch.equal(found, expected)
    graph = engines == "graphs"
    assert last(model) == {
        "prefill graph" if graph else "prefill eager": 1,
        "decode graph" if graph else "decode on preallocated states": 7,
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "end": {"eos_token_id": list(range(3, 40))},
    "stop": {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1000.0)])},
    "one": {"max_new_tokens": 1},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting: str) -> None:
    model = make("mamba-biased")
    expected, found = both(model, token_ids(2, 6), **SETTINGS[setting])
    assert torch.equal(found, expected)


def test_what_transformers_refuses_is_refused() -> None:
    model = make("mamba-biased")
    for config in (RuntimeConfig(), ON_CPU):
        runtime.configure(model, config)
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(token_ids(1, 6), **GREEDY, prompt_lookup_num_tokens=2)


def test_left_padding() -> None:
    model = make("mamba-biased")
    ids, mask = token_ids(3, 9), (torch.arange(9) >= torch.tensor([[0], [5], [8]])).long()
    expected, found = both(model, ids, attention_mask=mask)
    assert torch.equal(found, expected)
    expected, found = both(model, ids, attention_mask=None)
    assert torch.equal(found, expected)


def test_what_is_returned_beside_the_tokens() -> None:
    model = make("mamba-biased")
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = both(model, token_ids(2, 6), **options)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    for name in ("scores", "logits"):
        assert torch.equal(torch.stack(found[name]), torch.stack(expected[name]))
    expected, found = both(model, token_ids(2, 6), **options, output_hidden_states=True)
    assert torch.equal(found.hidden_states[-1][-1], expected.hidden_states[-1][-1])
    assert last(model)["eager: output_hidden_states in the call"] == 8


@torch.no_grad()
def test_a_returned_cache_is_the_callers_own() -> None:
    model = make("mamba-biased")
    ids = token_ids(2, 6)
    options = {"return_dict_in_generate": True}
    caches = []
    for config in (RuntimeConfig(), ON_CPU):
        runtime.configure(model, config)
        cache = DynamicCache(config=model.config)
        model.generate(ids, attention_mask=torch.ones_like(ids), cache_params=cache, **GREEDY, **options)
        caches.append(cache)
    model.generate(token_ids(2, 5, seed=7), attention_mask=torch.ones(2, 5, dtype=torch.long), **GREEDY)
    following = token_ids(2, 1, seed=3)
    expected, found = (model(following, cache_params=cache, use_cache=True).logits for cache in caches)
    assert torch.equal(found, expected)
    # A cache that was in use before goes on, eagerly.
    longer = torch.cat([ids, token_ids(2, 9, seed=1)], dim=1)
    for cache in caches:
        model.generate(longer, cache_params=cache, **GREEDY)
    assert any("in use before" in reason for reason in last(model))


def test_streamer_and_processors() -> None:
    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append([])

    class Odd(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, ::2] = -torch.inf  # in place: the engine's logits are not the caller's
            return scores

    model, ids, streams = make("mamba-biased"), token_ids(1, 6), []
    for config in (RuntimeConfig(), ON_CPU):
        runtime.configure(model, config)
        streams.append(Streamer())
        model.generate(ids, streamer=streams[-1], logits_processor=LogitsProcessorList([Odd()]), **GREEDY)
    assert streams[0].seen == streams[1].seen
    assert len(streams[0].seen) == 10


def test_batches_of_many_sizes_share_the_engines() -> None:
    model = make("mamba-biased")
    for batch, length in ((3, 7), (1, 20), (3, 2), (5, 7), (2, 9)):
        ids = token_ids(batch, length, seed=batch)
        runtime.configure(model, RuntimeConfig())
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        owner_of(model).config = ON_CPU
        for _ in range(2):
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY), expected)
    assert runtime.describe(model).state_bytes > 0
    runtime.release(model)
    assert runtime.describe(model).state_bytes == 0


def test_threads() -> None:
    model = make("mamba-biased")
    prompts = [token_ids(1 + n % 2, 5, seed=n) for n in range(6)]
    expected = [model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY) for ids in prompts]
    runtime.configure(model, ON_CPU)
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        ids = prompts[number]
        found[number] = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in range(6))


def test_what_makes_it_eager() -> None:
    model, ids = make("mamba"), token_ids(1, 4)
    assert runtime.describe(model).mode == "eager"
    assert "on cpu, RuntimeConfig.generate_on is ('cuda',)" in runtime.describe(model).because
    runtime.configure(model, ON_CPU)
    assert runtime.describe(model).mode == "preallocated states"
    with ops.reference():
        assert "quamba.ops.reference" in runtime.describe(model).because
    seen = []
    hook = model.backbone.layers[1].register_forward_hook(lambda *args: seen.append(1))
    model.generate(ids, **GREEDY)
    assert len(seen) == 8
    assert "forward hook on 'backbone.layers.1'" in str(runtime.describe(model))
    assert list(last(model)) == [f"eager: {runtime.describe(model).because}"]
    hook.remove()
    assert "attention layers" in runtime.describe(make("jamba")).because


def test_a_changed_model_is_noticed() -> None:
    model = make("mamba", dtype=torch.bfloat16)
    runtime.configure(model, ON_CPU)
    ids = token_ids(1, 6)
    model.generate(ids, **GREEDY)
    model.to(torch.float32)
    found = model.generate(ids, **GREEDY)
    runtime.configure(model, RuntimeConfig())
    assert torch.equal(found, model.generate(ids, **GREEDY))


def test_copies_and_checkpoints_have_it_too(tmp_path: Any) -> None:
    model = make("mamba")
    runtime.configure(model, ON_CPU)
    expected = model.generate(token_ids(1, 6), **GREEDY)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    del model
    for other in (copied, quamba.load(tmp_path)):
        assert runtime.describe(other).mode == "eager"
        runtime.configure(other, ON_CPU)
        assert torch.equal(other.generate(token_ids(1, 6), **GREEDY), expected)
        assert "eager" not in str(last(other)).replace("prefill eager", "")


def test_the_runtime_does_not_keep_a_model_alive() -> None:
    model = make("mamba")
    runtime.configure(model, ON_CPU)
    model.generate(token_ids(1, 6), **GREEDY)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
