"""The float mixer against transformers' own blocks, and against itself in pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quamba import ops
from quamba.errors import UnsupportedModelError
from quamba.models import find_adapter
from quamba.nn.config import BlockConfig
from quamba.nn.mixer import Mixer
from quamba.recipe import BLOCK_ACTIVATIONS
from tests.tiny import FAMILIES, hidden_states, make_mixer, make_model

BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all biases": {"in_bias": True, "out_bias": True},
    "learned norms": {"dbc_norm": "learned", "residual": False},
    "weightless norms": {"dbc_norm": "weightless", "conv_bias": False},
}


def original_block(model: nn.Module, layer: int, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """What transformers computes where our mixer will stand."""
    adapter: Any = find_adapter(model)
    if adapter.absorbed(layer):
        norm, mixer = model.get_submodule(adapter.absorbed(layer)[0]), model.get_submodule(adapter.module_name(layer))
        found: Tensor = mixer(norm(hidden), attention_mask=mask)
        return found
    block: Any = model.get_submodule(adapter.module_name(layer))
    found = block(hidden, attention_mask=mask)
    return found


def our_block(model: nn.Module, layer: int) -> Mixer:
    adapter = find_adapter(model)
    return Mixer(adapter.config(model, layer), adapter.tensors(model, layer))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 17])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_equals_transformers(family: str, length: int) -> None:
    model = make_model(family)
    for layer in find_adapter(model).layers(model):
        hidden = hidden_states(3, length, 24, seed=layer)
        expected = original_block(model, layer, hidden)
        found = our_block(model, layer)(hidden)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_block_in_bfloat16_is_no_worse_than_transformers(family: str) -> None:
    ratios = []
    for seed in range(4):
        half = make_model(family, dtype=torch.bfloat16, seed=seed)
        wide = make_model(family, dtype=torch.bfloat16, seed=seed).float()
        hidden = hidden_states(4, 33, 24, dtype=torch.bfloat16, seed=seed)
        for layer in find_adapter(half).layers(half):
            exact = original_block(wide, layer, hidden.float())
            theirs, ours = original_block(half, layer, hidden), our_block(half, layer)(hidden)
            assert ours.dtype == theirs.dtype
            ratios.append((ours.float() - exact).norm() / (theirs.float() - exact).norm())
    # One block's error hangs on a few large values; over all of them the better arithmetic shows.
    assert float(torch.stack(ratios).log().mean().exp()) < 1.0
    assert float(torch.stack(ratios).amax()) < 2.5


@torch.no_grad()
# Not "mamba-biased": transformers lets in_proj's bias into the padding; ours does not (the next test).
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_masked_block_equals_transformers(family: str) -> None:
    model = make_model(family)
    layer = find_adapter(model).layers(model)[0]
    hidden = hidden_states(3, 9, 24)
    mask = torch.arange(9) >= torch.tensor([[0], [4], [8]])
    expected = original_block(model, layer, hidden, mask.long())
    found = our_block(model, layer)(hidden, mask=mask.long())
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-4)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 sums."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < 3e-6


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_left_padding_changes_nothing(block: str, dtype: torch.dtype) -> None:
    mixer = make_mixer(**BLOCKS[block])
    hidden = hidden_states(2, 13, 24)
    padded = torch.cat([hidden_states(2, 5, 24, seed=1), hidden], dim=1)
    mask = (torch.arange(18) >= 5).expand(2, 18).to(dtype)
    alone, beside = mixer.new_state(2, hidden.device), mixer.new_state(2, hidden.device)
    expected = mixer(hidden, state=alone)
    found = mixer(padded, mask=mask, state=beside)[:, 5:]
    for left, right in ((found, expected), (beside.ssm, alone.ssm), (beside.conv, alone.conv)):
        assert_near(left, right)


def in_pieces(mixer: Mixer, hidden: Tensor, lengths: list[int]) -> Tensor:
    state = mixer.new_state(hidden.shape[0], hidden.device)
    return torch.cat([mixer(piece, state=state) for piece in hidden.split(lengths, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1] * 12, [5, 7], [1, 1, 10], [11, 1], [2, 3, 1, 6]])
@pytest.mark.parametrize("block", BLOCKS)
def test_pieces_equal_the_whole(block: str, lengths: list[int]) -> None:
    mixer = make_mixer(**BLOCKS[block])
    hidden = hidden_states(2, 12, 24)
    assert_near(in_pieces(mixer, hidden, lengths), mixer(hidden))


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_kernels_equal_the_references(block: str) -> None:
    mixer = make_mixer(**BLOCKS[block])
    hidden = hidden_states(2, 35, 24)
    with ops.reference():
        expected = mixer(hidden)
    assert_near(mixer(hidden), expected)


@torch.no_grad()
def test_the_future_and_the_neighbours_do_not_matter() -> None:
    mixer = make_mixer()
    hidden = hidden_states(3, 10, 24)
    changed = hidden.clone()
    changed[1, 6:] += 1.0
    before, after = mixer(hidden), mixer(changed)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1, :6], after[1, :6], rtol=0, atol=1e-6)
    assert float((before[1, 6:] - after[1, 6:]).abs().min(dim=-1).values.min()) > 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "fp32", "expected"),
    [
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, True, torch.float32),
    ],
)
def test_dtype_of_the_residual_stream(dtype: torch.dtype, fp32: bool, expected: torch.dtype) -> None:
    mixer = make_mixer(dtype=dtype, residual_in_fp32=fp32)
    assert mixer(hidden_states(1, 3, 24, dtype=dtype)).dtype == expected


@torch.no_grad()
def test_the_observer_sees_every_site_with_the_mask() -> None:
    mixer = make_mixer(dbc_norm="learned")
    mask = torch.arange(7) >= torch.tensor([[0], [3]])
    seen: dict[str, Tensor] = {}

    def observer(site: str, value: Tensor, found: Tensor | None) -> None:
        assert found is mask
        assert site not in seen
        seen[site] = value

    mixer.observer = observer
    mixer(hidden_states(2, 7, 24), mask=mask)
    widths = {"u": 24, "x0": 48, "z": 48, "x": 48, "d": 3, "B": 5, "C": 5, "dt": 48, "g": 48}
    assert {site: tuple(value.shape) for site, value in seen.items()} == {s: (2, 7, w) for s, w in widths.items()}
    assert set(widths) == set(BLOCK_ACTIVATIONS)


def test_wrong_tensors_raise() -> None:
    mixer = make_mixer()
    tensors = mixer.tensors()
    with pytest.raises(UnsupportedModelError, match="expected exactly"):
        Mixer(mixer.config, {name: tensor for name, tensor in tensors.items() if name != "D"})
    with pytest.raises(UnsupportedModelError, match="expected exactly"):
        Mixer(mixer.config, {**tensors, "out_proj.bias": torch.zeros(24)})
    with pytest.raises(UnsupportedModelError, match=r"found A_log of shape \(48, 4\); expected \(48, 5\)"):
        Mixer(mixer.config, {**tensors, "A_log": torch.zeros(48, 4)})
    with pytest.raises(UnsupportedModelError, match="found dbc_norm 'layer'"):
        make_mixer(dbc_norm="layer")


def test_tensors_are_held_not_copied_and_need_no_gradient() -> None:
    config: BlockConfig = make_mixer().config
    tensors = {name: torch.randn(shape) for name, shape in config.tensor_shapes().items()}
    mixer = Mixer(config, tensors)
    assert all(mixer.tensors()[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert not any(parameter.requires_grad for parameter in mixer.parameters())
    assert set(mixer.state_dict()) == set(tensors)
    assert not mixer.training


def test_an_empty_mixer_is_filled_by_name() -> None:
    full = make_mixer(in_bias=True)
    empty = Mixer.empty(full.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(full.state_dict(), assign=True)
    hidden = hidden_states(1, 4, 24)
    assert torch.equal(empty(hidden), full(hidden))
