"""The quantized mixer against a plain float64 simulation of the same integers, and against itself in pieces."""

import copy
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quamba import hadamard, numerics, ops
from quamba.convert import fill_mixer
from quamba.errors import CalibrationError, QuambaError
from quamba.nn.config import MixerState
from quamba.nn.mixer import Mixer
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.ops.registry import Op
from quamba.recipe import BLOCK_ACTIVATIONS, BLOCK_WEIGHTS, BlockFormat, QuantSpec, Step
from quamba.recipes import RECIPES
from quamba.transforms import Transforms
from tests.tiny import find_transforms, hidden_states, make_mixer, observe, quantize_mixer

BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all biases": {"in_bias": True, "out_bias": True},
    "learned norms": {"dbc_norm": "learned", "residual": False},
    "weightless norms": {"dbc_norm": "weightless", "conv_bias": False},
}
FORMATS = {name: recipe.block(0) for name, recipe in RECIPES.items() if name != "float" and not recipe.simulated}
CHANNEL, TOKEN, CLIPPED = QuantSpec("channel"), QuantSpec("token"), QuantSpec("channel", "percentile", 0.98)


def changed(recipe: str, *steps: Step, **specs: QuantSpec | None) -> BlockFormat:
    """A recipe's format with other specs for some sites and weights, and steps besides."""
    format = RECIPES[recipe].block(0)
    return BlockFormat(
        activations={**format.activations, **{k: v for k, v in specs.items() if k in BLOCK_ACTIVATIONS}},
        weights={**format.weights, **{k: v for k, v in specs.items() if k in BLOCK_WEIGHTS}},
        steps=(*format.steps, *steps),
    )


NO_SITES = dict.fromkeys(BLOCK_ACTIVATIONS)
NO_WEIGHTS = dict.fromkeys(BLOCK_WEIGHTS)
VARIANTS: dict[str, BlockFormat] = {
    **{f"float {site}": changed("naive", **{site: None}) for site in (*BLOCK_ACTIVATIONS, *BLOCK_WEIGHTS)},
    **{f"quamba-c, float {s}": changed("quamba-c", **{s: None}) for s in ("x0", "z", "x", "d", "B", "C", "dt")},
    **{f"per tensor {name}": changed("quamba", **{name: QuantSpec()}) for name in BLOCK_WEIGHTS},
    **{f"per channel {site}": changed("quamba", **{site: CHANNEL}) for site in ("x0", "z", "x", "B", "C", "dt")},
    **{f"per token {site}": changed("quamba", **{site: TOKEN}) for site in ("u", "x", "d", "g")},
    "clipped per channel": changed("quamba-c", x0=CLIPPED, z=CLIPPED, x=CLIPPED, dt=CLIPPED),
    "weights alone": changed("quamba", **NO_SITES),
    "activations alone": changed("quamba-c", **NO_WEIGHTS),
    "smoothed, x float": changed("quamba-c", x=None),
    "smoothed, x per token": changed("quamba-c", x=TOKEN),
    "smoothed, g per token": changed("smoothquant", g=TOKEN),
    "smoothed, u per token": changed("smoothquant", u=TOKEN),
    "rotated x per token": changed("mamba-had", x=TOKEN),
    "rotated x per channel": changed("quamba", Step("rotate_x"), x=CHANNEL),
    "rotated x, smoothed g": changed("quamba-c", Step("rotate_x"), x=QuantSpec()),
    "rotated x per channel, smoothed g": changed("quamba-c", Step("rotate_x")),
    "rotated x per token, smoothed g": changed("quamba-c", Step("rotate_x"), x=TOKEN),
}


def rounded(value: Tensor, spec: QuantSpec | None, alpha: Tensor | None) -> Tensor:
    """float64: the nearest values that the spec's integers can stand for."""
    if spec is None:
        return value
    if spec.granularity == "token":
        alpha = value.abs().amax(dim=-1, keepdim=True)
    assert alpha is not None
    scale = alpha.double().clamp(min=1e-8) / 127
    return (value / scale).round().clamp(-128, 127) * scale


def simulate(
    mixer: Mixer, format: BlockFormat, transforms: Transforms, alphas: Mapping[str, Tensor], hidden: Tensor
) -> Tensor:
    """What the integers of a quantized block should give, in float64, by the method's formulas (design, section 1)."""
    c, w = mixer.config, {name: tensor.double() for name, tensor in mixer.tensors().items()}
    hidden = hidden.double()

    def site(name: str, value: Tensor) -> Tensor:
        return rounded(value, format.activations[name], alphas.get(name))

    def weight(name: str, value: Tensor) -> Tensor:
        spec = format.weights[name]
        if spec is None:
            return value
        alpha = value.abs().amax(dim=1, keepdim=True) if spec.granularity == "channel" else value.abs().amax()
        return rounded(value, QuantSpec(), alpha)

    def norm(value: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        value = value * (value.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        return value if gain is None else value * gain

    def matrix(size: int, turn: bool) -> Tensor:
        return hadamard.matrix(size) if turn else torch.eye(size, dtype=torch.float64)

    smooth_u = 1.0 if transforms.u_divisor is None else transforms.u_divisor.double()
    smooth_g = 1.0 if transforms.g_divisor is None else transforms.g_divisor.double()
    turn_u = matrix(c.d_model, transforms.rotate_u)
    turn_x, turn_g = matrix(c.d_inner, transforms.rotate_x), matrix(c.d_inner, transforms.rotate_g)
    gain = w["norm.weight"]
    in_proj = w["in_proj.weight"] * smooth_u
    if transforms.rotate_u:
        in_proj, gain = w["in_proj.weight"] * gain @ turn_u.T, torch.ones_like(gain)
    u = site("u", norm(hidden, gain, c.norm_eps) / smooth_u)
    x0, z = (u @ weight("in_proj", in_proj).T + w.get("in_proj.bias", 0.0)).split(c.d_inner, dim=-1)
    x0, z = site("x0", x0), site("z", z)

    taps = weight("conv", w["conv.weight"])
    past = F.pad(x0, (0, 0, c.d_conv - 1, 0))
    x = sum(past[:, k : k + x0.shape[1]] * taps[:, k] for k in range(c.d_conv)) + w.get("conv.bias", 0.0)
    x = site("x", F.silu(x) @ turn_x.T)
    x_proj = w["x_proj.weight"] @ turn_x.T
    spec = format.activations["x"]
    if spec is not None and spec.granularity == "channel":
        scale = alphas["x"].double() / 127
        dbc = (x / scale) @ weight("x_proj", x_proj * scale).T
    else:
        dbc = x @ weight("x_proj", x_proj).T
    x = x @ turn_x
    d, B, C = dbc.split([c.dt_rank, c.d_state, c.d_state], dim=-1)
    if c.dbc_norm != "none":
        d, B, C = (norm(v, w.get(f"{n}_norm.weight"), c.dbc_eps) for v, n in ((d, "d"), (B, "B"), (C, "C")))
    d, B, C = site("d", d), site("B", B), site("C", C)
    dt = F.softplus(site("dt", d @ weight("dt_proj", w["dt_proj.weight"]).T) + w["dt_bias"])

    state = torch.zeros(x.shape[0], c.d_inner, c.d_state, dtype=torch.float64)
    rows = []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t, :, None] * w["A_log"].exp())
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        rows.append((state * C[:, t, None, :]).sum(dim=-1) + w["D"] * x[:, t])
    g = torch.stack(rows, dim=1) * F.silu(z) / smooth_g
    g = site("g", g @ turn_g.T)
    out = g @ weight("out_proj", turn_u @ w["out_proj.weight"] * smooth_g @ turn_g.T).T
    if "out_proj.bias" in w:
        out = out + turn_u @ w["out_proj.bias"]
    return out + hidden if c.residual else out


def made(mixer: Mixer, format: BlockFormat, hidden: Tensor) -> tuple[QuantizedMixer, Transforms, dict[str, Tensor]]:
    transforms = find_transforms(mixer, format, hidden)
    static = {s: spec for s, spec in format.activations.items() if spec is not None and spec.granularity != "token"}
    alphas = observe(mixer, static, transforms, hidden)
    filled = fill_mixer(QuantizedMixer(mixer.config, format), mixer, transforms=transforms, alphas=alphas)
    return filled, transforms, alphas


def own(mixer: Mixer | QuantizedMixer, out: Tensor, hidden: Tensor) -> Tensor:
    """The mixer's part of a block's output, which the residual stream would hide."""
    return out - hidden if mixer.config.residual else out


def check_against_simulation(mixer: Mixer, format: BlockFormat, hidden: Tensor) -> None:
    quantized, transforms, alphas = made(mixer, format, hidden)
    stream = ops.hadamard(hidden) if transforms.rotate_u else hidden
    expected = own(mixer, simulate(mixer, format, transforms, alphas, stream), stream)
    # A value that float32 rounds to the other side of a half makes one step of difference here and there.
    assert numerics.sqnr_db(expected, own(mixer, quantized(stream), stream)) > 45
    with ops.reference():
        assert numerics.sqnr_db(expected, own(mixer, quantized(stream), stream)) > 45


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("recipe", FORMATS)
def test_recipe_equals_its_simulation(recipe: str, block: str) -> None:
    check_against_simulation(make_mixer(**BLOCKS[block]), FORMATS[recipe], hidden_states(2, 31, 24))


@torch.no_grad()
@pytest.mark.parametrize("block", ["all biases", "learned norms"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_its_simulation(variant: str, block: str) -> None:
    check_against_simulation(make_mixer(**BLOCKS[block]), VARIANTS[variant], hidden_states(2, 31, 24))


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("recipe", FORMATS)
def test_recipe_stays_close_to_the_float_mixer(recipe: str, block: str) -> None:
    mixer, hidden = make_mixer(**BLOCKS[block]), hidden_states(2, 31, 24)
    quantized = quantize_mixer(mixer, FORMATS[recipe], hidden)
    expected = own(mixer, mixer(hidden), hidden)
    if FORMATS[recipe].step("rotate_residual") is not None:
        hidden, expected = ops.hadamard(hidden), ops.hadamard(expected)
    # Two channels six times as loud as the others cost per-tensor scales much.
    bound = {"quamba-c": 21, "dynamic": 24, "mamba-ptq": 14, "quamba-tensor": 14}.get(recipe, 16)
    assert numerics.sqnr_db(expected, own(mixer, quantized(hidden), hidden)) > bound


@torch.no_grad()
@pytest.mark.parametrize("name", [*BLOCK_ACTIVATIONS, *BLOCK_WEIGHTS])
def test_one_site_alone_costs_little(name: str) -> None:
    mixer, hidden = make_mixer(in_bias=True), hidden_states(2, 31, 24)
    expected = own(mixer, mixer(hidden), hidden)
    alone = changed("naive", **{site: None for site in (*BLOCK_ACTIVATIONS, *BLOCK_WEIGHTS) if site != name})
    found = own(mixer, quantize_mixer(mixer, alone, hidden)(hidden), hidden)
    everything = own(mixer, quantize_mixer(mixer, FORMATS["naive"], hidden)(hidden), hidden)
    assert numerics.sqnr_db(expected, found) > numerics.sqnr_db(expected, everything)
    assert 20 < numerics.sqnr_db(expected, found) < 60


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32", [True, False])
def test_half_precision_originals(dtype: torch.dtype, fp32: bool) -> None:
    mixer = make_mixer(dtype=dtype, residual_in_fp32=fp32, in_bias=True, out_bias=True)
    hidden = hidden_states(2, 31, 24).to(torch.float32 if fp32 else dtype)
    quantized = quantize_mixer(mixer, FORMATS["quamba-c"], hidden)
    found = quantized(hidden)
    assert found.dtype == hidden.dtype
    assert numerics.sqnr_db(mixer(hidden) - hidden, found - hidden) > 22
    assert {quantized.norm_weight.dtype, quantized.D.dtype, quantized.A_log.dtype} == {dtype}
    assert quantized.x_scale.dtype == quantized.A.dtype == torch.float32


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Every int8 result of an op, in order, as (op, (B, L, D)); single steps get their L."""
    found: list[tuple[str, Tensor]] = []
    call = Op.__call__

    def recording(self: Op, *args: Any) -> Any:
        out = call(self, *args)
        for tensor in out if isinstance(out, tuple) else (out,):
            if tensor.dtype == torch.int8:
                found.append((self.name.removesuffix("_step"), tensor[:, None] if tensor.dim() == 2 else tensor))
        return out

    monkeypatch.setattr(Op, "__call__", recording)
    return found


def joined(pieces: list[list[tuple[str, Tensor]]]) -> list[tuple[str, Tensor]]:
    """The integers of consecutive pieces of a sequence, end to end."""
    assert len({tuple(name for name, _ in piece) for piece in pieces}) == 1
    return [(pieces[0][i][0], torch.cat([piece[i][1] for piece in pieces], dim=1)) for i in range(len(pieces[0]))]


def assert_close_integers(
    left: list[tuple[str, Tensor]], right: list[tuple[str, Tensor]], *, step: int = 1, share: float = 1e-3
) -> None:
    assert [name for name, _ in left] == [name for name, _ in right]
    assert left
    steps = [(a.int() - b.int()).abs().flatten() for (_, a), (_, b) in zip(left, right, strict=True)]
    apart = torch.cat(steps)
    assert int(apart.max()) <= step
    assert float((apart != 0).double().mean()) < share


PIECES = {"single steps": [1] * 24, "halves": [13, 11], "prompt, then steps": [21, 1, 1, 1], "mixed": [1, 2, 20, 1]}
STATEFUL = {
    **{name: format for name, format in FORMATS.items()},
    **{name: VARIANTS[name] for name in ("float x0", "float dt", "weights alone", "rotated x per token")},
}


@torch.no_grad()
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("variant", STATEFUL)
@pytest.mark.parametrize("op_by_op", [True, False], ids=["op by op", "one op a step"])
def test_pieces_equal_the_whole(op_by_op: bool, pieces: str, variant: str, integers: list[tuple[str, Tensor]]) -> None:
    block = "learned norms" if variant in ("naive", "quamba-c") else "all biases"
    mixer, hidden = make_mixer(**BLOCKS[block]), hidden_states(3, 24, 24)
    quantized = quantize_mixer(mixer, STATEFUL[variant], hidden)
    if op_by_op:
        # The op for one step of a whole block shows no integers inside it.
        quantized.step_arguments = None
    integers.clear()
    whole_state = quantized.new_state(3, hidden.device)
    expected = quantized(hidden, state=whole_state)
    whole = list(integers)
    state = quantized.new_state(3, hidden.device)
    outs, parts = [], []
    for piece in hidden.split(PIECES[pieces], dim=1):
        integers.clear()
        outs.append(quantized(piece, state=state))
        parts.append(list(integers))
    if op_by_op and variant != "weights alone":
        assert_close_integers(joined(parts), whole)
    if state.conv.dtype == torch.int8:
        assert_close_integers([("conv_state", state.conv)], [("conv_state", whole_state.conv)], share=4e-3)
    assert state.conv.dtype == quantized.state_dtype()
    torch.testing.assert_close(state.ssm, whole_state.ssm, rtol=1e-2, atol=1e-2 * float(whole_state.ssm.abs().max()))
    found = torch.cat(outs, dim=1)
    assert numerics.sqnr_db(own(mixer, expected, hidden), own(mixer, found, hidden)) > 45


ONE_STEP = {"naive", "mamba-ptq", "clip", "hadamard", "quamba", "quamba-tensor", "quamba-o", "quamba-c", "smoothquant"}
ONE_STEP |= {"float dt"}


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("variant", STATEFUL)
def test_the_step_in_one_op_equals_the_step_op_by_op(variant: str, block: str) -> None:
    hidden = hidden_states(3, 24, 24)
    quantized = quantize_mixer(make_mixer(**BLOCKS[block]), STATEFUL[variant], hidden)
    assert (quantized.step_arguments is not None) == (variant in ONE_STEP)

    def steps() -> tuple[Tensor, MixerState]:
        state = quantized.new_state(3, hidden.device)
        return torch.cat([quantized(token, state=state) for token in hidden.split(1, dim=1)], dim=1), state

    together, state = steps()
    quantized.step_arguments = None
    apart, expected = steps()
    assert together.dtype == apart.dtype
    # A value on the edge of a step may fall to its other side, and moves others from there on.
    assert numerics.sqnr_db(apart, together) > 45
    assert int((state.conv.int() - expected.conv.int()).abs().max()) <= 1
    torch.testing.assert_close(state.ssm, expected.ssm, rtol=1e-2, atol=1e-2 * float(expected.ssm.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("fp32", [True, False])
def test_the_step_in_one_op_keeps_the_dtype(fp32: bool) -> None:
    mixer = make_mixer(dtype=torch.bfloat16, residual_in_fp32=fp32)
    hidden = hidden_states(2, 3, 24).to(torch.bfloat16)
    quantized = quantize_mixer(mixer, FORMATS["quamba"], hidden)
    assert quantized.step_arguments is not None
    state = quantized.new_state(2, hidden.device)
    expected = quantized(hidden, state=quantized.new_state(2, hidden.device))
    found = torch.cat([quantized(token, state=state) for token in hidden.split(1, dim=1)], dim=1)
    assert found.dtype == expected.dtype == (torch.float32 if fp32 else torch.bfloat16)
    assert numerics.sqnr_db(expected, found) > 40


@torch.no_grad()
def test_the_step_follows_the_buffers() -> None:
    hidden = hidden_states(2, 1, 24)
    quantized = quantize_mixer(make_mixer(), FORMATS["quamba"], hidden_states(2, 31, 24))

    def step(mixer: QuantizedMixer) -> Tensor:
        return own(mixer, mixer(hidden, state=mixer.new_state(2, hidden.device)), hidden)

    before = step(quantized)
    copied = copy.deepcopy(quantized)
    copied.out_proj.weight_scale.mul_(2)  # in place, the same tensors
    torch.testing.assert_close(step(copied), 2 * before)
    quantized.to(torch.float32)
    quantized.load_state_dict(copied.state_dict())
    torch.testing.assert_close(step(quantized), 2 * before)
    quantized._apply(lambda tensor: tensor.clone())  # other tensors
    quantized.out_proj.weight_scale.mul_(2)
    torch.testing.assert_close(step(quantized), 4 * before)
    quantized.out_proj.weight_scale = copied.out_proj.weight_scale / 2  # replaced, so finalize has to follow
    quantized.finalize()
    torch.testing.assert_close(step(quantized), before)


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("recipe", FORMATS)
def test_kernels_equal_the_references(recipe: str, block: str, integers: list[tuple[str, Tensor]]) -> None:
    hidden = hidden_states(2, 40, 24)
    quantized = quantize_mixer(make_mixer(**BLOCKS[block]), FORMATS[recipe], hidden)
    integers.clear()
    quantized(hidden)
    kernels = list(integers)
    integers.clear()
    with ops.reference():
        quantized(hidden)
    assert len(kernels) >= 4
    # One value on the edge of a step at an early site moves others at the later ones.
    assert_close_integers(kernels, list(integers), step=2, share=5e-3)


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("recipe", ["naive", "quamba-c", "mamba-had", "dynamic"])
def test_left_padding_changes_nothing(recipe: str, block: str) -> None:
    mixer, hidden = make_mixer(**BLOCKS[block]), hidden_states(2, 13, 24)
    quantized = quantize_mixer(mixer, FORMATS[recipe], hidden)
    padded = torch.cat([hidden_states(2, 5, 24, seed=1), hidden], dim=1)
    mask = (torch.arange(18) >= 5).expand(2, 18)
    alone, beside = quantized.new_state(2, hidden.device), quantized.new_state(2, hidden.device)
    with ops.reference():
        expected = quantized(hidden, state=alone)
        found = quantized(padded, mask=mask, state=beside)[:, 5:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(beside.ssm, alone.ssm, rtol=0, atol=1e-5)
    assert torch.equal(beside.conv, alone.conv)


@torch.no_grad()
@pytest.mark.parametrize("recipe", FORMATS)
def test_compiles_without_a_break(recipe: str) -> None:
    hidden = hidden_states(2, 8, 24)
    quantized = quantize_mixer(make_mixer(in_bias=True), FORMATS[recipe], hidden)
    compiled = torch.compile(quantized, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden), quantized(hidden))
    state, other = quantized.new_state(2, hidden.device), quantized.new_state(2, hidden.device)
    compiled(hidden, state=state), quantized(hidden, state=other)
    torch.testing.assert_close(compiled(hidden[:, :1], state=state), quantized(hidden[:, :1], state=other))
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs a C++ compiler on a CPU")
@pytest.mark.parametrize("recipe", ["quamba-c", "mamba-had", "dynamic"])
def test_compiles_with_the_default_backend(recipe: str) -> None:
    hidden = hidden_states(2, 8, 24)
    quantized = quantize_mixer(make_mixer(in_bias=True), FORMATS[recipe], hidden)
    compiled = torch.compile(quantized, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), quantized(hidden), rtol=1e-4, atol=1e-4)
    state, other = quantized.new_state(2, hidden.device), quantized.new_state(2, hidden.device)
    torch.testing.assert_close(compiled(hidden, state=state), quantized(hidden, state=other), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        compiled(hidden[:, :1], state=state), quantized(hidden[:, :1], state=other), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(state.ssm, other.ssm, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_an_unfilled_mixer_raises() -> None:
    empty = QuantizedMixer(make_mixer().config, FORMATS["quamba"])
    with pytest.raises(QuambaError, match="expected it to be filled and finalized first"):
        empty(hidden_states(1, 2, 24))
    with pytest.raises(QuambaError, match=r"found empty buffers \['norm_weight'"):
        empty.finalize()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["naive", "quamba-c", "mamba-had", "dynamic"])
def test_filled_by_name(variant: str) -> None:
    hidden = hidden_states(2, 9, 24)
    full = quantize_mixer(make_mixer(dbc_norm="learned", in_bias=True), FORMATS[variant], hidden)
    empty = QuantizedMixer(full.config, FORMATS[variant])
    shapes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (empty, full)]
    assert shapes[0] == shapes[1]
    empty.load_state_dict(full.state_dict(), assign=True)
    empty.finalize()
    assert torch.equal(empty(hidden), full(hidden))


@torch.no_grad()
def test_missing_and_misshapen_statistics_raise() -> None:
    mixer, hidden = make_mixer(), hidden_states(2, 9, 24)
    format = FORMATS["quamba-c"]
    _, transforms, alphas = made(mixer, format, hidden)
    for broken, message in (
        ({k: v for k, v in alphas.items() if k != "d"}, "found none for the statistic of site 'd'"),
        (
            {**alphas, "x": alphas["x"].amax()},
            r"found shape \(\) for the statistic of site 'x'; expected shape \(48,\)",
        ),
        ({**alphas, "g": torch.tensor(float("nan"))}, "NaN"),
    ):
        with pytest.raises(CalibrationError, match=message):
            fill_mixer(QuantizedMixer(mixer.config, format), mixer, transforms=transforms, alphas=broken)


@torch.no_grad()
def test_a_silent_site_keeps_a_usable_scale() -> None:
    mixer = make_mixer()
    tensors = {**mixer.tensors(), "D": torch.zeros(48), "x_proj.weight": torch.zeros(13, 48)}
    silent, hidden = Mixer(mixer.config, tensors), hidden_states(1, 5, 24)
    found = quantize_mixer(silent, FORMATS["quamba-c"], hidden)(hidden)
    torch.testing.assert_close(found, hidden)
