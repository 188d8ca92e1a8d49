"""Tiny random models, and our mixers made from them: small enough that every test makes its own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from quamba.convert import fill_mixer
from quamba.models import find_adapter
from quamba.nn.config import BlockConfig
from quamba.nn.mixer import Mixer
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.observers import make_observer
from quamba.recipe import BlockFormat, QuantSpec
from quamba.recipes import RECIPES
from quamba.transforms import Transforms, smoothing_divisor

VOCABULARY = 97
FAMILIES = ("mamba", "mamba-biased", "falcon_mamba", "jamba")
# The recipes whose models hold int8 values, or nothing but float ones, and so can be saved.
SAVED_RECIPES = [name for name, recipe in RECIPES.items() if not recipe.simulated]


def make_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of one of FAMILIES with random weights; `changes` go to its transformers config."""
    torch.manual_seed(seed)
    model: nn.Module
    if family == "jamba":
        model = JambaForCausalLM(JambaConfig(**(_JAMBA | changes)))
    elif family == "falcon_mamba":
        model = FalconMambaForCausalLM(FalconMambaConfig(**(_MAMBA | changes)))
    else:
        biases = {"use_bias": True, "use_conv_bias": True} if family == "mamba-biased" else {"use_conv_bias": False}
        model = MambaForCausalLM(MambaConfig(**(_MAMBA | biases | changes)))
    randomize(model, seed=seed)
    return model.to(dtype).eval()


_MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "state_size": 5,
    "num_hidden_layers": 3,
    "time_step_rank": 3,
    "eos_token_id": None,
}
_JAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "num_experts": 3,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 7,
    "mamba_dt_rank": 5,
    "eos_token_id": None,
}


@torch.no_grad()
def randomize(model: nn.Module, *, seed: int) -> None:
    """Give every parameter values that matter: norms apart from one, biases and skips apart from zero."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if name.endswith("A_log") or "dt_proj.bias" in name:
            parameter.add_(0.1 * noise(parameter))
        elif "norm" in name or name.endswith(".D"):
            parameter.copy_(1 + 0.3 * noise(parameter))
        elif parameter.dim() == 1:
            parameter.copy_(0.2 * noise(parameter))
        elif "embed" in name:
            parameter.copy_(noise(parameter))
        elif "conv1d" in name:
            parameter.copy_(0.5 * noise(parameter))
        else:
            parameter.copy_(1.2 * noise(parameter) / parameter.shape[-1] ** 0.5)


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def install_float(model: nn.Module) -> nn.Module:
    """Put our float mixers into a model, in place."""
    adapter = find_adapter(model)
    for layer in adapter.layers(model):
        adapter.install(model, layer, Mixer(adapter.config(model, layer), adapter.tensors(model, layer)))
    adapter.after_install(model)
    return model


def make_mixer(*, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Mixer:
    """A float mixer with random weights and a few loud channels; `changes` go to its BlockConfig."""
    shape: dict[str, Any] = {
        "d_model": 24,
        "d_inner": 48,
        "d_state": 5,
        "d_conv": 4,
        "dt_rank": 3,
        "norm_eps": 1e-5,
        "in_bias": False,
        "conv_bias": True,
        "out_bias": False,
        "dbc_norm": "none",
        "dbc_eps": 1e-6,
        "residual": True,
        "residual_in_fp32": True,
        "dtype": dtype,
    }
    config = BlockConfig(**(shape | changes))
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, size: tuple[int, ...]) -> Tensor:
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        if name == "A_log":
            return torch.arange(1, size[1] + 1, dtype=torch.float64).log().expand(size) + 0.1 * noise
        if name == "dt_bias":
            return -3 + noise
        if "norm" in name or name == "D":
            return 1 + 0.3 * noise
        if name == "in_proj.weight":
            noise[1] *= 6  # a loud channel of x0 and one of z, so that smoothing and clipping have work to do
            noise[config.d_inner + 7] *= 6
        return (0.2 if len(size) == 1 else 1.2 / size[-1] ** 0.5) * noise

    return Mixer(config, {name: tensor(name, size).to(dtype) for name, size in config.tensor_shapes().items()})


def hidden_states(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A residual stream with uneven channels."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(shape[-1], generator=generator, dtype=torch.float64).exp()
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * channels).to(dtype)


def mixers_of(family: str, dtype: torch.dtype = torch.float32) -> dict[int, Mixer]:
    """A tiny model's mixers in float, by layer, as quantize() makes them."""
    model = make_model(family, dtype=dtype)
    adapter = find_adapter(model)
    return {n: Mixer(adapter.config(model, n), adapter.tensors(model, n)) for n in adapter.layers(model)}


@torch.no_grad()
def find_transforms(mixer: Mixer, format: BlockFormat, hidden: Tensor) -> Transforms:
    """The coordinates that a format's steps ask for, smoothing by what the mixer does to `hidden`."""
    divisors: dict[str, Tensor] = {}
    for site, step_name, weight in (("u", "smooth_input", "in_proj"), ("g", "smooth_output", "out_proj")):
        step = format.step(step_name)
        if step is not None and step.alpha is not None:
            seen = observe(mixer, {site: QuantSpec("channel")}, Transforms(), hidden)
            columns = mixer.tensors()[f"{weight}.weight"].abs().amax(dim=0)
            divisors[site] = smoothing_divisor(seen[site], columns, step.alpha)
    return Transforms(
        u_divisor=divisors.get("u"),
        rotate_u=format.step("rotate_residual") is not None,
        rotate_x=format.step("rotate_x") is not None,
        g_divisor=divisors.get("g"),
        rotate_g=format.step("rotate_output") is not None,
    )


@torch.no_grad()
def observe(mixer: Mixer, specs: dict[str, QuantSpec], transforms: Transforms, hidden: Tensor) -> dict[str, Tensor]:
    """The clipping magnitude of some sites, in the coordinates of `transforms`, over one batch."""
    observers = {site: make_observer(spec) for site, spec in specs.items()}
    watched = Mixer(mixer.config, mixer.tensors(), transforms=transforms)

    def see(site: str, value: Tensor, mask: Tensor | None) -> None:
        if site in observers:
            observers[site].update(value.flatten(0, 1))

    watched.observer = see
    watched(hidden)
    return {site: observer.alpha() for site, observer in observers.items()}


@torch.no_grad()
def quantize_mixer(mixer: Mixer, format: BlockFormat, hidden: Tensor) -> QuantizedMixer:
    """The quantized twin of a float mixer, calibrated on `hidden` (B, L, E)."""
    transforms = find_transforms(mixer, format, hidden)
    static = {s: spec for s, spec in format.activations.items() if spec is not None and spec.granularity != "token"}
    return fill_mixer(
        QuantizedMixer(mixer.config, format),
        mixer,
        transforms=transforms,
        alphas=observe(mixer, static, transforms, hidden),
    )
