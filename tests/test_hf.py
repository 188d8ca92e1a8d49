"""transformers' from_pretrained: bit-equal to the model in memory, or an error before anything is returned."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, MambaForCausalLM
from transformers.utils import hub

import quamba
from quamba.checkpoint import layout, load, save
from quamba.errors import CheckpointError
from quamba.hf import QuambaConfig, QuambaQuantizer
from quamba.nn.mixer import Mixer
from tests.checkpoint.files import assert_same, contents, quantized, rewrite, rewrite_config
from tests.tiny import FAMILIES, SAVED_RECIPES, make_model


def from_pretrained(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", SAVED_RECIPES)
def test_from_pretrained_is_bit_equal(tmp_path: Path, family: str, recipe: str) -> None:
    model = quantized(family, recipe)
    model.save_pretrained(tmp_path)
    found = from_pretrained(tmp_path)
    assert_same(found, model)
    assert found.quantization == model.quantization
    assert not found.training
    assert not any(p.requires_grad for m in found.modules() if isinstance(m, Mixer) for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [(), ("layers.0", "layers.1.x", "head"), ("embedding",), ("head", "embedding")])
@pytest.mark.parametrize("recipe", ["quamba-c", "mamba-had"])
@pytest.mark.parametrize("family", ["mamba-biased", "jamba"])
def test_half_precision_and_parts_kept_in_float(
    tmp_path: Path, family: str, recipe: str, keep: tuple[str, ...], dtype: torch.dtype
) -> None:
    model = quantized(family, recipe, dtype=dtype, keep=keep)
    model.save_pretrained(tmp_path)
    found, info = from_pretrained(tmp_path, output_loading_info=True)
    assert_same(found, model)
    assert found.dtype == dtype
    assert not any(info.values()), info


def test_a_tied_float_weight_stays_tied(tmp_path: Path) -> None:
    quantized(keep=("head", "embedding")).save_pretrained(tmp_path)
    found = from_pretrained(tmp_path)
    assert found.lm_head.weight is found.backbone.embeddings.weight


def test_shards(tmp_path: Path) -> None:
    model = quantized("jamba")
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert_same(from_pretrained(tmp_path / "out"), model)


def test_weights_that_transformers_rescales_are_left_alone(tmp_path: Path) -> None:
    """transformers divides out_proj at every load of a float model with this option."""
    model = make_model("mamba", rescale_prenorm_residual=True)
    ids = torch.arange(12)[None]
    quamba.quantize(model, [ids], keep=["layers.0"], progress=False)
    model.save_pretrained(tmp_path)
    assert_same(from_pretrained(tmp_path), model)


def test_another_dtype_leaves_integers_and_scales_alone(tmp_path: Path) -> None:
    model = quantized("jamba", "quamba-c", keep=("layers.1.dt",))
    model.save_pretrained(tmp_path)
    found = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(found, load(tmp_path, dtype=torch.bfloat16))
    kept = {name: t for name, t in model.state_dict().items() if layout.is_scale(name) or not t.is_floating_point()}
    assert kept
    for name, tensor in kept.items():
        assert torch.equal(found.state_dict()[name], tensor)
        assert found.state_dict()[name].dtype == tensor.dtype


def test_a_loaded_model_saves_itself_and_so_does_its_copy(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path / "1")
    found = from_pretrained(tmp_path / "1")
    found.save_pretrained(tmp_path / "2")
    copy.deepcopy(found).save_pretrained(tmp_path / "3")
    for name in ("model.safetensors", "config.json"):
        content = (tmp_path / "1" / name).read_bytes()
        assert (tmp_path / "2" / name).read_bytes() == content
        assert (tmp_path / "3" / name).read_bytes() == content


def test_what_transformers_asks_of_a_quantized_model(tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path)
    for found in (model, load(tmp_path), from_pretrained(tmp_path)):
        assert isinstance(found, MambaForCausalLM)
        assert isinstance(found.hf_quantizer, QuambaQuantizer)
        assert found.hf_quantizer.is_serializable()
        assert not found.hf_quantizer.is_trainable
        assert found.is_quantized
        assert found.quantization_method == "quamba"
        assert found.config._is_quantized
        assert (
            found.config.quantization_config.to_dict()
            == json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        )
        with pytest.raises(ValueError, match="not supported for quantized"):
            found.half()
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "quamba"


def test_generation_is_the_same(tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(from_pretrained(tmp_path).generate(ids, **options), expected)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(bytes(data))


def zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.layers.0.mixer.x_scale"].zero_()


DAMAGES: dict[str, tuple[Any, str]] = {
    "flipped bit": (lambda path: flip(path / "model.safetensors"), "checksum"),
    "zero scale": (lambda path: rewrite(path, zero), "x_scale.*not positive"),
    "missing": (lambda path: rewrite(path, lambda t: t.pop("backbone.layers.0.mixer.x_scale")), "x_scale"),
    "surplus": (lambda path: rewrite(path, lambda t: t.update(more=torch.ones(1))), "more"),
    "changed config": (
        lambda path: rewrite_config(path, lambda c: c.update(layer_norm_epsilon=0.5), sealed=False),
        "config.json.*checksum",
    ),
    "unknown version": (
        lambda path: rewrite_config(path, lambda c: c["quantization_config"].update(format_version=9)),
        "config.json.*format_version 9",
    ),
    "no recipe": (
        lambda path: rewrite_config(path, lambda c: c["quantization_config"].pop("recipe")),
        "config.json.*recipe",
    ),
    "another depth": (lambda path: rewrite_config(path, lambda c: c.update(num_hidden_layers=2)), "layers.2"),
    "saved again by others": (
        lambda path: save_file(contents(path / "model.safetensors"), path / "model.safetensors", {"format": "pt"}),
        "metadata",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    save(quantized(), tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_a_float_model_is_not_quantized_by_its_config(tmp_path: Path) -> None:
    make_model("mamba").save_pretrained(tmp_path)
    config = QuambaConfig(quantized().quantization)
    with pytest.raises(ValueError, match="pre-quantized"):
        from_pretrained(tmp_path, quantization_config=config)


def test_a_model_from_nowhere_raises(tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint files"):
        MambaForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(tmp_path), state_dict=model.state_dict()
        )


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
path = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(path)
except RuntimeError as error:
    print("without quamba:", error)
import quamba
model = AutoModelForCausalLM.from_pretrained(path)
print("with quamba:", type(model.hf_quantizer).__name__)
"""


@pytest.mark.parametrize("recipe", ["quamba", "float"])
def test_a_process_without_quamba_gets_an_error_and_no_model(tmp_path: Path, recipe: str) -> None:
    quantized(recipe=recipe).save_pretrained(tmp_path)
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert "without quamba: You set `ignore_mismatched_sizes` to `False`" in result.stdout
    assert "with quamba: QuambaQuantizer" in result.stdout


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = quantized()
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))
    api = SimpleNamespace(create_repo=lambda *args, **options: SimpleNamespace(repo_id="somebody/model"))
    monkeypatch.setattr(hub, "hf_api", lambda *args, **options: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: card)
    uploaded = tmp_path / "uploaded"

    def upload(self: Any, working_dir: str, repo_id: str, *args: Any, **options: Any) -> None:
        shutil.copytree(working_dir, uploaded)

    monkeypatch.setattr(MambaForCausalLM, "_upload_modified_files", upload)
    model.push_to_hub("somebody/model")
    assert (uploaded / "README.md").read_text() == "a card"
    assert_same(from_pretrained(uploaded), model)
