"""quantize(): the pipeline end to end on tiny random models."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconMambaConfig, JambaConfig, LlamaConfig, MambaConfig

import quamba
from quamba import Override, calibration, quantize
from quamba.data import KeptBatches
from quamba.errors import CalibrationError, RecipeError, UnsupportedModelError
from quamba.models import find_adapter
from quamba.nn.ends import QuantizedEmbedding, QuantizedHead
from quamba.nn.mixer import Mixer
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.nn.simulated_mixer import SimulatedMixer
from quamba.observation import Statistics, collect
from quamba.recipe import QuantSpec, Recipe, Step

VOCABULARY = 96
CONFIGS = {
    "mamba": MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=5, num_hidden_layers=2, time_step_rank=3, use_bias=True
    ),
    "mamba-untied": MambaConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, tie_word_embeddings=False, use_conv_bias=False
    ),
    "falcon": FalconMambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2),
    "jamba": JambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=4,
        attn_layer_offset=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=3,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).to(dtype).eval()


def tokens(rows: int = 6, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits.float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("recipe", quamba.RECIPES)
def test_every_recipe_stays_close_to_the_float_model(kind: str, recipe: str) -> None:
    model = make_model(kind)
    ids = tokens(seed=1)
    expected = logits_of(model, ids)
    assert quantize(model, [tokens()], recipe) is model
    bound = 1e-5 if recipe == "float" else 0.1 if not quamba.RECIPES[recipe].simulated else 0.7
    assert relative_error(logits_of(model, ids), expected) < bound
    assert model.quantization.recipe.name == recipe
    mixers = [m for m in model.modules() if isinstance(m, (Mixer, QuantizedMixer))]
    assert len(mixers) == len(find_adapter(model).layers(model))
    kind_of_mixer = SimulatedMixer if quamba.RECIPES[recipe].simulated else QuantizedMixer
    assert {type(m) for m in mixers} == {Mixer if recipe == "float" else kind_of_mixer}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_ends_are_quantized_and_stay_tied(kind: str) -> None:
    model = make_model(kind)
    tied = model.config.tie_word_embeddings
    quantize(model, [tokens()])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedHead)
    assert (head.table is embedding) == tied
    assert any(name.startswith("lm_head.qweight") for name in model.state_dict()) != tied


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba", "falcon", "mamba-untied"])
def test_smoothing_the_head_helps_where_its_channels_differ(kind: str) -> None:
    def float_model() -> torch.nn.Module:
        made = make_model(kind)
        adapter = find_adapter(made)
        norm = made.get_submodule(adapter.final_norm(made))
        norm.weight.copy_(torch.logspace(-1, 1, norm.weight.numel()))
        return made

    plain = quamba.RECIPES["naive"].with_overrides([Override("layers.*"), Override("embedding")])
    smooth = dataclasses.replace(plain, steps=(Step("smooth_head", 0.7),))
    ids = tokens()
    expected = logits_of(float_model(), ids)

    def error(recipe: Recipe) -> float:
        return float((logits_of(quantize(float_model(), [ids], recipe), ids) - expected).square().mean())

    assert error(smooth) < 0.5 * error(plain)


def test_mamba_had_turns_the_tied_ends_apart() -> None:
    model = make_model("mamba")
    quantize(model, [tokens()], "mamba-had")
    assert model.get_output_embeddings().table is model.get_output_embeddings()
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("recipe", ["quamba", "quamba-c", "mamba-had"])
@pytest.mark.parametrize("keep", [["layers.0"], ["embedding"], ["head"], ["layers.*.x"], ["layers.*.g", "layers.1.u"]])
def test_parts_can_be_kept_in_float(recipe: str, keep: list[str]) -> None:
    model = make_model("mamba")
    ids = tokens(seed=1)
    expected = logits_of(model, ids)
    quantize(model, [tokens()], recipe, keep=keep)
    assert relative_error(logits_of(model, ids), expected) < 0.1
    kept = Override(keep[0])
    assert not any(kept.matches(address) for address in model.quantization.statistics)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_quantize(dtype: torch.dtype) -> None:
    model = make_model("mamba", dtype)
    ids = tokens(seed=1)
    expected = logits_of(make_model("mamba"), ids)
    quantize(model, [tokens()], "quamba-c")
    assert relative_error(logits_of(model, ids), expected) < 0.1
    assert model.get_submodule("backbone.layers.0").mixer.A_log.dtype == dtype


def test_shards_merge_to_the_same_scales_as_one_pass() -> None:
    model = make_model("mamba")
    adapter = find_adapter(model)
    recipe = quamba.RECIPES["quamba-o"]
    mixers = {n: Mixer(adapter.config(model, n), adapter.tensors(model, n)) for n in adapter.layers(model)}
    for n, mixer in mixers.items():
        adapter.install(model, n, mixer)
    plan = calibration.static_plan(recipe, mixers)

    def observe(ids: Tensor) -> Statistics:
        batches = KeptBatches([ids], samples=None, device="cpu")
        return collect(model=model, adapter=adapter, mixers=mixers, plan=plan, batches=batches)

    ids = tokens(8)
    whole, left, right = observe(ids), observe(ids[:3]), observe(ids[3:])
    left.merge(right)
    for address in plan:
        torch.testing.assert_close(left.alpha(address), whole.alpha(address), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["mamba-untied", "falcon", "jamba"])
def test_padding_does_not_enter_the_statistics(kind: str) -> None:
    ids = tokens(2, 30)
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(37) >= 7).long().expand(2, -1)
    plain, masked = make_model(kind), make_model(kind)
    quantize(plain, [ids])
    quantize(masked, [{"input_ids": padded, "attention_mask": mask}])
    expected = plain.state_dict()
    for name, tensor in masked.state_dict().items():
        if name.endswith("_scale"):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=0, msg=name)


def test_a_percentile_clips_x_alone() -> None:
    loose, tight = make_model("mamba"), make_model("mamba")
    quantize(loose, [tokens()], percentile=1.0)
    quantize(tight, [tokens()], percentile=0.95)
    a, b = loose.quantization.statistics, tight.quantization.statistics
    assert a["layers.0.x"].clipped == 0
    assert 0.03 < b["layers.0.x"].clipped < 0.07
    assert a["layers.0.u"] == b["layers.0.u"]


@pytest.mark.parametrize("site", ["x", "x0", "g"])
@pytest.mark.parametrize("recipe", ["naive", "quamba-c"])
def test_headroom_multiplies_the_scale_of_its_site(recipe: str, site: str) -> None:
    spec = quamba.RECIPES[recipe].activations[site]
    models = []
    for headroom in (1.0, 3.0):
        # The vocabulary's range has no headroom, so that with it the scale need not grow by the same factor.
        own = Override(f"layers.1.{site}", dataclasses.replace(spec, headroom=headroom, vocabulary=False))
        models.append(quantize(make_model("mamba"), [tokens()], quamba.RECIPES[recipe].with_overrides([own])))
    plain, roomy = (model.state_dict() for model in models)
    for name in plain:
        if name.endswith("_scale") and "x_proj" not in name:
            factor = 3.0 if name.endswith(f"layers.1.mixer.{site}_scale") else 1.0
            torch.testing.assert_close(roomy[name], plain[name] * factor)


def test_a_search_keeps_the_headroom() -> None:
    base = quamba.RECIPES["naive"]
    recipe = dataclasses.replace(base, activations={**base.activations, "x": QuantSpec(headroom=2.0)})
    searched = quantize(make_model("mamba"), [tokens()], recipe, percentile="search")
    spec = searched.quantization.recipe.spec("layers.1.x")
    assert spec.headroom == 2.0
    direct = quantize(make_model("mamba"), [tokens()], recipe, percentile=spec.percentile)
    name = "backbone.layers.1.mixer.x_scale"
    torch.testing.assert_close(searched.state_dict()[name], direct.state_dict()[name])


@torch.no_grad()
@pytest.mark.parametrize("reach", [None, 1.5])
def test_no_channel_of_u_goes_beyond_its_reach(reach: float | None) -> None:
    base = quamba.RECIPES["quamba-c"]
    steps = tuple(dataclasses.replace(s, reach=reach) if s.name == "smooth_input" else s for s in base.steps)
    recipe = dataclasses.replace(base, steps=steps)
    # A low percentile, which leaves several channels beyond the clip even in so little data.
    recipe = recipe.with_overrides([Override("layers.0.u", QuantSpec("tensor", "percentile", 0.8))])
    original, model = make_model("mamba"), quantize(make_model("mamba"), [tokens()], recipe)
    norm = original.backbone.layers[0].norm
    values = norm(original.backbone.embeddings(tokens())) / norm.weight
    mixer = model.backbone.layers[0].mixer
    farthest = float((values * mixer.norm_weight).abs().amax() / (127 * mixer.u_scale))
    assert farthest > 2 if reach is None else farthest == pytest.approx(reach, rel=1e-5)
    assert model.quantization.statistics["layers.0.u"].clipped <= 0.21


@torch.no_grad()
def test_no_token_of_the_vocabulary_is_clipped_in_the_first_block() -> None:
    original = make_model("mamba")
    block = original.backbone.layers[0]
    # x0 and z of the first block depend on one token each: all that they can be.
    reach = block.mixer.in_proj(block.norm(original.backbone.embeddings.weight)).abs().amax(dim=0)
    model = quantize(make_model("mamba"), [torch.full((1, 6), 3)], "quamba-c")
    mixer = model.backbone.layers[0].mixer
    for scale, channels in ((mixer.x0_scale, reach.chunk(2)[0]), (mixer.z_scale, reach.chunk(2)[1])):
        assert bool((127 * scale >= channels * (1 - 1e-5)).all())
    narrow = {
        site: spec and dataclasses.replace(spec, vocabulary=False)
        for site, spec in quamba.RECIPES["quamba-c"].activations.items()
    }
    recipe = dataclasses.replace(quamba.RECIPES["quamba-c"], activations=narrow)
    narrow_mixer = quantize(make_model("mamba"), [torch.full((1, 6), 3)], recipe).backbone.layers[0].mixer
    assert bool((127 * narrow_mixer.z_scale < reach.chunk(2)[1]).any())


def test_a_clip_that_was_asked_for_is_not_undone_by_rare_tokens() -> None:
    model = quantize(make_model("mamba"), [tokens()], "quamba-c", percentile=0.9)
    spec = model.quantization.recipe.spec("layers.0.x")
    assert (spec.percentile, spec.vocabulary) == (0.9, False)
    assert model.quantization.recipe.spec("layers.0.x0").vocabulary
    assert model.quantization.statistics["layers.0.x"].clipped > 0.03


@pytest.mark.parametrize("recipe", ["quamba", "quamba-c"])
def test_search_picks_a_candidate_for_every_layer_and_is_no_worse(recipe: str) -> None:
    model = make_model("mamba")
    quantize(model, [tokens()], recipe, percentile="search")
    levels = [model.quantization.recipe.spec(f"layers.{n}.x").percentile for n in range(2)]
    assert all(level in quamba.search.CANDIDATES for level in levels)


def test_a_generator_of_calibration_data_serves_several_passes() -> None:
    one, other = make_model("mamba"), make_model("mamba")
    ids = tokens()
    quantize(one, (row[None] for row in ids), "quamba-c")
    quantize(other, [ids], "quamba-c")
    expected = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(
            tensor.float(), expected[name].float(), rtol=1e-3, atol=1.0 if "qweight" in name else 1e-6
        )


class TestErrors:
    def test_an_unknown_model_names_what_is_supported(self) -> None:
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(UnsupportedModelError, match=r"llama.*falcon_mamba.*jamba.*mamba"):
            quantize(model, [tokens()])

    def test_quantizing_twice(self) -> None:
        model = quantize(make_model("mamba"), [tokens()])
        with pytest.raises(UnsupportedModelError, match="already"):
            quantize(model, [tokens()])

    def test_no_data(self) -> None:
        with pytest.raises(CalibrationError, match="calib_data"):
            quantize(make_model("mamba"), None)

    def test_searching_in_a_simulation(self) -> None:
        with pytest.raises(RecipeError, match=r"percentile='search' for 'quamba-w4a4 \(simulation\)'"):
            quantize(make_model("mamba"), [tokens()], "quamba-w4a4", percentile="search")

    @pytest.mark.parametrize("percentile", ["best", 1.5, 0.0])
    def test_a_bad_percentile(self, percentile: float | str) -> None:
        with pytest.raises(RecipeError, match="percentile"):
            quantize(make_model("mamba"), [tokens()], percentile=percentile)

    def test_keep_that_matches_nothing(self) -> None:
        with pytest.raises(RecipeError, match=r"layers\.9"):
            quantize(make_model("mamba"), [tokens()], keep=["layers.9.x"])

    def test_nan_names_the_site_and_leaves_the_model_as_it_was(self) -> None:
        model = make_model("mamba")
        modules = {name: type(module) for name, module in model.named_modules()}
        with torch.no_grad():
            model.backbone.layers[1].mixer.conv1d.weight[3] = float("nan")
        model.train()
        with pytest.raises(CalibrationError, match=r"layers\.1\.g"):
            quantize(model, [tokens()])
        assert {name: type(module) for name, module in model.named_modules()} == modules
        assert model.training
        assert not hasattr(model, "quantization")

    def test_data_that_fails_half_way_leaves_the_model_as_it_was(self) -> None:
        model = make_model("jamba")
        expected = logits_of(model, tokens())

        def broken() -> object:
            yield tokens()
            raise RuntimeError("the disk is gone")

        with pytest.raises(RuntimeError, match="the disk is gone"):
            quantize(model, broken())
        assert torch.equal(logits_of(model, tokens()), expected)
