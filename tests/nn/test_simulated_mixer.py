"""The simulated mixer beside the quantized one, and what it rounds to."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quamba import numerics
from quamba.convert import simulate_mixer
from quamba.errors import CalibrationError
from quamba.nn.mixer import Mixer
from quamba.nn.simulated_mixer import SimulatedMixer
from quamba.recipe import BlockFormat, QuantSpec
from quamba.recipes import RECIPES
from tests.tiny import find_transforms, hidden_states, make_mixer, observe, quantize_mixer

BLOCKS = {
    "plain": {},
    "biases, no residual": {"in_bias": True, "out_bias": True, "residual": False},
    "learned norms": {"dbc_norm": "learned", "residual": False},
    "weightless norms": {"dbc_norm": "weightless", "residual_in_fp32": False},
}


def narrowed(format: BlockFormat, bits: int) -> BlockFormat:
    """The same format in other bits."""
    activations = {site: spec and replace(spec, bits=bits) for site, spec in format.activations.items()}
    weights = {name: spec and replace(spec, bits=bits) for name, spec in format.weights.items()}
    return replace(format, activations=activations, weights=weights)


def simulated(mixer: Mixer, format: BlockFormat, hidden: Tensor) -> SimulatedMixer:
    transforms = find_transforms(mixer, format, hidden)
    static = {s: spec for s, spec in format.activations.items() if spec is not None and spec.granularity != "token"}
    return simulate_mixer(
        mixer, format, transforms=transforms, alphas=observe(mixer, static, transforms, hidden)
    ).requires_grad_(False)


@pytest.mark.parametrize("recipe", ["naive", "mamba-ptq", "quamba", "quamba-c", "smoothquant", "mamba-had", "dynamic"])
@pytest.mark.parametrize("block", BLOCKS)
def test_with_8_bits_it_is_the_quantized_mixer(recipe: str, block: str) -> None:
    mixer, format = make_mixer(**BLOCKS[block]), RECIPES[recipe].block(0)
    hidden = hidden_states(2, 19, 24)
    expected = quantize_mixer(mixer, format, hidden)(hidden) - hidden
    found = simulated(mixer, format, hidden)(hidden) - hidden
    difference = (found - expected).norm() / expected.norm()
    error = (mixer(hidden) - hidden - expected).norm() / expected.norm()
    # Apart from values that lie between two integers and round either way.
    assert float(difference) < 0.3 * float(error)


@pytest.mark.parametrize("recipe", ["quamba-w4a4", "mamba-had-w4a4"])
def test_weights_and_sites_take_16_values(recipe: str) -> None:
    mixer, format = make_mixer(), RECIPES[recipe].block(0)
    hidden = hidden_states(2, 19, 24)
    found = simulated(mixer, format, hidden)
    for name in ("in_proj.weight", "conv.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"):
        for row in found.tensors()[name]:
            step = row.abs().max() / 7
            assert torch.equal((row / step).round().clamp(-7, 7), (row / step).round())
            torch.testing.assert_close((row / step).round() * step, row, rtol=1e-5, atol=0)
    for site in format.activations:
        scale = getattr(found, f"{site}_scale")
        beyond = torch.linspace(-20, 20, 41)[:, None] * scale
        assert found._see(site, beyond, None).div(scale).round().unique().tolist() == list(range(-8, 8))


def test_fewer_bits_cost_more() -> None:
    mixer, hidden = make_mixer(), hidden_states(2, 19, 24)
    errors = [
        float((simulated(mixer, narrowed(RECIPES["quamba"].block(0), bits), hidden)(hidden) - mixer(hidden)).norm())
        for bits in (8, 6, 5, 4)
    ]
    assert errors == sorted(errors)
    assert errors[3] > 8 * errors[0]


def test_a_site_that_stays_float_is_not_rounded() -> None:
    mixer, hidden = make_mixer(), hidden_states(2, 19, 24)
    format = RECIPES["naive"].block(0)
    nothing = replace(
        format,
        activations=dict.fromkeys(format.activations),
        weights={**dict.fromkeys(format.weights), "conv": QuantSpec(bits=2)},
    )
    found = simulated(mixer, nothing, hidden)
    assert not [name for name, _ in found.named_buffers()]
    plain = {**mixer.tensors(), "conv.weight": numerics.simulate_weight(mixer.conv.weight, per_channel=False, bits=2)}
    torch.testing.assert_close(found(hidden), Mixer(mixer.config, plain)(hidden))


def test_steps_with_a_state_are_the_whole_sequence() -> None:
    mixer, hidden = make_mixer(), hidden_states(2, 9, 24)
    found = simulated(mixer, narrowed(RECIPES["quamba-c"].block(0), 4), hidden)
    state = found.new_state(2, hidden.device)
    parts = [found(hidden[:, i : i + 1], state=state) for i in range(9)]
    whole = found(hidden)
    close = torch.isclose(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)
    assert float(close.float().mean()) > 0.98


@pytest.mark.parametrize("block", BLOCKS)
def test_it_gives_the_dtype_of_a_quantized_mixer(block: str) -> None:
    mixer, format = make_mixer(dtype=torch.bfloat16, **BLOCKS[block]), RECIPES["quamba-c"].block(0)
    hidden = hidden_states(2, 9, 24, dtype=torch.bfloat16)
    expected = quantize_mixer(mixer, format, hidden)(hidden)
    assert simulated(mixer, narrowed(format, 4), hidden)(hidden).dtype == expected.dtype


def test_the_divisor_moves_with_the_module() -> None:
    found = simulated(make_mixer(), narrowed(RECIPES["quamba-c"].block(0), 4), hidden_states(2, 19, 24))
    hidden = hidden_states(1, 5, 24)
    copied = copy.deepcopy(found)
    assert torch.equal(copied(hidden), found(hidden))
    moved = copied.to("meta")
    assert moved.transforms.g_divisor is not None
    assert moved.transforms.g_divisor.device.type == "meta"


def test_a_missing_statistic_raises() -> None:
    mixer, format = make_mixer(), RECIPES["quamba-w4a4"].block(0)
    transforms = find_transforms(mixer, format, hidden_states(1, 5, 24))
    with pytest.raises(CalibrationError, match="found none for the statistic of site 'u'"):
        simulate_mixer(mixer, format, transforms=transforms, alphas={})
