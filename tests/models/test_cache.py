"""Our state in transformers' caches: prompts, steps, batches, beams; also under the newest transformers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quamba import ops, quantize
from quamba.errors import UnsupportedModelError
from quamba.models import find_adapter, quantized_layers
from quamba.models.cache import padding_mask, state_of
from tests.tiny import hidden_states, make_mixer, make_model, token_ids

FAMILIES = ("mamba-biased", "falcon_mamba", "jamba")
RECIPES = ("float", "quamba-c", "dynamic")
NEW = 8


def make(family: str, recipe: str, **options: Any) -> Any:
    return quantize(make_model(family, **options), [token_ids(8, 24, seed=5)], recipe)


def cache_of(model: nn.Module) -> tuple[str, DynamicCache]:
    """The model's argument for the cache, and an empty one."""
    config: Any = model.config
    return "past_key_values" if config.model_type == "jamba" else "cache_params", DynamicCache(config=config)


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, lengths: list[int], mask: Tensor | None = None) -> Tensor:
    """The logits of a sequence that is fed in pieces through a cache."""
    name, cache = cache_of(model)
    out, done = [], 0
    for piece in ids.split(lengths, dim=1):
        done += piece.shape[1]
        seen = None if mask is None else mask[:, :done]
        out.append(model(piece, attention_mask=seen, use_cache=True, **{name: cache}).logits)
    return torch.cat(out, dim=1)


def full_greedy(model: Any, ids: Tensor, new_tokens: int = NEW) -> Tensor:
    """Greedy generation without a cache."""
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", torch.ones_like(ids))
    found: Tensor = model.generate(ids, **options)
    return found


@pytest.mark.parametrize("lengths", [[1] * 12, [7, 5], [9, 1, 1, 1], [1, 11]])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_the_full_forward(family: str, recipe: str, lengths: list[int]) -> None:
    model, ids = make(family, recipe), token_ids(3, 12)
    # Under the references, so that both ways round alike; the kernels are held to theirs elsewhere.
    with ops.reference(), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = in_pieces(model, ids, lengths)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_in_pieces_stay_close_to_the_full_forward(family: str, recipe: str) -> None:
    model, ids = make(family, recipe), token_ids(3, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    found = in_pieces(model, ids, [9, 1, 1, 1])
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if recipe == "float" else 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_float_generation_equals_transformers(family: str) -> None:
    ids = token_ids(2, 7)
    original = make_model(family)
    expected = generate(original, ids)
    model = make(family, "float")
    assert torch.equal(generate(model, ids), expected)
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20}):
        torch.manual_seed(0)
        expected = generate(original, ids, **options)
        torch.manual_seed(0)
        assert torch.equal(generate(model, ids, **options), expected)


@pytest.mark.parametrize("recipe", ["quamba-c", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_generation_equals_full_passes(family: str, recipe: str) -> None:
    model, ids = make(family, recipe), token_ids(3, 7)
    assert torch.equal(generate(model, ids), full_greedy(model, ids))
    beams = {"num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(generate(model, ids, **beams), generate(model, ids, use_cache=False, **beams))
    assert torch.equal(generate(model, ids, cache_implementation="static"), full_greedy(model, ids))
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        samples.append(generate(model, ids, do_sample=True, top_k=5, use_cache=use_cache))
    assert torch.equal(*samples)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_generates_what_each_row_does(family: str, recipe: str) -> None:
    model = make(family, recipe)
    rows = [token_ids(1, length, seed=length) for length in (9, 4, 1)]
    padded = torch.cat([torch.cat([torch.zeros(1, 9 - row.shape[1], dtype=torch.int64), row], dim=1) for row in rows])
    mask = torch.cat([(torch.arange(9) >= 9 - row.shape[1])[None].long() for row in rows])
    found = generate(model, padded, attention_mask=mask)
    for row, tokens in zip(rows, found, strict=True):
        assert torch.equal(generate(model, row)[0, row.shape[1] :], tokens[9:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[12], [5, 7], [10, 1, 1]])
def test_padded_pieces_equal_unpadded_rows(family: str, lengths: list[int]) -> None:
    model, ids = make(family, "quamba-c"), token_ids(2, 12)
    mask = torch.arange(12) >= torch.tensor([[0], [4]])
    with ops.reference():
        found = in_pieces(model, ids, lengths, mask.long())
        expected = [in_pieces(model, ids[:1], [12]), in_pieces(model, ids[1:, 4:], [8])]
    for row, logits in zip((found[:1], found[1:, 4:]), expected, strict=True):
        assert float((row - logits).abs().max() / logits.abs().max()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["float", "quamba-c"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_can_be_reordered_copied_and_reset(family: str, recipe: str) -> None:
    model, ids = make(family, recipe), token_ids(3, 6)
    name, cache = cache_of(model)
    model(ids, use_cache=True, **{name: cache})
    following = token_ids(3, 1, seed=2)
    copied = copy.deepcopy(cache)
    expected = model(following, use_cache=True, **{name: copied}).logits
    turned = copy.deepcopy(cache)
    order = torch.tensor([2, 0, 2])
    turned.reorder_cache(order)
    torch.testing.assert_close(model(following[order], use_cache=True, **{name: turned}).logits, expected[order])
    # The copies went their own way: the first cache still stands behind the prompt.
    torch.testing.assert_close(model(following, use_cache=True, **{name: cache}).logits, expected)
    if model.config.model_type != "jamba":  # whose attention layers keep their tokens
        cache.reset()
        first = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=True, **{name: cache}).logits, first)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["float", "quamba-c", "dynamic"])
def test_states_are_updated_where_they_lie(recipe: str) -> None:
    model = make("jamba", recipe, dtype=torch.bfloat16)
    name, cache = cache_of(model)
    model(token_ids(2, 6), use_cache=True, **{name: cache})
    adapter = find_adapter(model)
    before = {layer: cache.layers[layer].recurrent_states[0].clone() for layer in adapter.layers(model)}
    places = {layer: cache.layers[layer].recurrent_states[0].data_ptr() for layer in before}
    model(token_ids(2, 1), use_cache=True, **{name: cache})
    for layer, mixer in quantized_layers(adapter, model):
        state = cache.layers[layer]
        assert state.recurrent_states[0].dtype == torch.float32
        assert state.conv_states[0].dtype == mixer.state_dtype()
        assert state.recurrent_states[0].data_ptr() == places[layer]
        assert not torch.equal(state.recurrent_states[0], before[layer])
        assert state.has_previous_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_records_the_past_raises(family: str) -> None:
    model = make(family, "quamba-c")
    name, cache = cache_of(model)
    cache.activate_past_recording()
    with pytest.raises(UnsupportedModelError, match=r"assisted decoding.*cannot be rolled back"):
        model(token_ids(1, 4), use_cache=True, **{name: cache})


def test_a_cache_of_another_kind_raises() -> None:
    mixer, hidden = make_mixer(), hidden_states(1, 2, 24)
    attention: Any = make_model("jamba").config
    for cache, layer in ((DynamicCache(), 0), (DynamicCache(config=attention), 2), ("a cache", 0)):
        with pytest.raises(UnsupportedModelError, match=r"expected .*DynamicCache\(config=model\.config\)"):
            state_of(cache, layer, mixer, hidden)
    assert state_of(None, 0, mixer, hidden) is None


def test_padding_mask() -> None:
    hidden, mask = hidden_states(2, 3, 24), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    found = padding_mask(mask, hidden)
    assert found is not None
    assert found.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padding_mask(mask[:, :3], hidden) is not None
    assert padding_mask(None, hidden) is None
    assert padding_mask(mask[:, None, None], hidden) is None


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_zero_states_of_its_own(family: str) -> None:
    model = make(family, "quamba-c")
    _, cache = cache_of(model)
    layers = dict(quantized_layers(find_adapter(model), model))
    hidden = hidden_states(3, 5, model.config.hidden_size)
    states = {layer: state_of(cache, layer, mixer, hidden) for layer, mixer in layers.items()}
    storages = set()
    for layer, state in states.items():
        fresh = layers[layer].new_state(3, hidden.device)
        entry: Any = cache.layers[layer]
        assert state is not None
        assert state.conv is entry.conv_states[0]
        assert state.ssm is entry.recurrent_states[0]
        for found, expected in ((state.conv, fresh.conv), (state.ssm, fresh.ssm)):
            assert torch.equal(found, expected)
            assert found.dtype is expected.dtype
            assert found.is_contiguous()
            storages.add(found.untyped_storage().data_ptr())
            found.fill_(1)
        again = state_of(cache, layer, layers[layer], hidden)
        assert again is not None
        assert again.conv is state.conv
        assert again.ssm is state.ssm
    assert len(storages) == 2 * len(layers)


@torch.no_grad()
def test_states_of_another_shape_are_made_when_a_layer_asks() -> None:
    first, second = make_mixer(), make_mixer(d_inner=24)
    cache = DynamicCache(config=make_model("mamba-biased").config)
    hidden = hidden_states(2, 5, 24)
    one, two = state_of(cache, 0, first, hidden), state_of(cache, 1, second, hidden)
    assert one is not None
    assert two is not None
    assert (one.conv.shape[1], two.conv.shape[1], two.ssm.shape[1]) == (48, 24, 24)
    assert not two.conv.any()
    assert not two.ssm.any()


def test_a_mask_is_converted_once_for_all_layers() -> None:
    hidden, mask = hidden_states(2, 3, 24), torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = padding_mask(mask, hidden)
    assert found is not None
    assert found.dtype is torch.bool
    assert found.tolist() == mask.bool().tolist()
    assert padding_mask(mask, hidden) is found
    mask[0, 1] = 0
    again = padding_mask(mask, hidden)
    assert again is not None
    assert again.tolist() == mask.bool().tolist()
