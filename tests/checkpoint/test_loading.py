"""Loading: bit-equal to what was saved, and never more in memory than that."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from quamba.checkpoint import layout, load, save
from quamba.errors import CheckpointError
from quamba.nn.mixer import Mixer
from tests.checkpoint.files import assert_same, contents, logits, metadata, quantized
from tests.tiny import FAMILIES, SAVED_RECIPES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", SAVED_RECIPES)
def test_a_loaded_model_is_bit_equal(tmp_path: Path, family: str, recipe: str) -> None:
    model = quantized(family, recipe)
    save(model, tmp_path / "out")
    found = load(tmp_path / "out")
    assert_same(found, model)
    assert found.quantization == model.quantization
    assert not found.training
    assert type(found) is type(model)
    assert not any(p.requires_grad for m in found.modules() if isinstance(m, Mixer) for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [(), ("layers.0", "layers.1.x", "head"), ("embedding",), ("head", "embedding")])
@pytest.mark.parametrize("recipe", ["quamba-c", "mamba-had"])
@pytest.mark.parametrize("family", ["mamba-biased", "jamba"])
def test_half_precision_and_parts_kept_in_float(
    tmp_path: Path, family: str, recipe: str, keep: tuple[str, ...], dtype: torch.dtype
) -> None:
    model = quantized(family, recipe, dtype=dtype, keep=keep)
    save(model, tmp_path / "out")
    assert_same(load(tmp_path / "out"), model)


def test_a_tied_float_weight_is_saved_once_and_stays_tied(tmp_path: Path) -> None:
    model = quantized(keep=("head", "embedding"))
    assert model.lm_head.weight is model.backbone.embeddings.weight
    save(model, tmp_path / "out")
    assert "lm_head.weight" not in contents(tmp_path / "out" / "model.safetensors")
    found = load(tmp_path / "out")
    assert found.lm_head.weight is found.backbone.embeddings.weight
    found.lm_head.weight = nn.Parameter(found.lm_head.weight.detach().clone())
    with pytest.raises(CheckpointError, match="tied"):
        save(found, tmp_path / "out")


def test_a_tied_quantized_head_has_no_tensors_of_its_own(tmp_path: Path) -> None:
    save(quantized(), tmp_path / "out")
    names = set(contents(tmp_path / "out" / "model.safetensors"))
    assert {name for name in names if name.startswith("lm_head")} == {"lm_head.input_scale"}
    found = load(tmp_path / "out")
    assert found.lm_head.table is found.backbone.embeddings


def test_shards_and_their_index(tmp_path: Path) -> None:
    model, out = quantized("jamba"), tmp_path / "out"
    model.save_pretrained(out, max_shard_size="20KB")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for shard in shards:
        assert set(contents(shard)) == {name for name, file in index["weight_map"].items() if file == shard.name}
        assert len(metadata(shard)["quamba.tensors"].split()) == len(contents(shard))
    assert_same(load(out), model)
    model.save_pretrained(out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_same(load(out), model)


def test_equal_models_give_equal_files_and_other_files_stay(tmp_path: Path) -> None:
    model, out = quantized(), tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    (out / "model-00007-of-00009.safetensors").write_text("left from another save")
    model.save_pretrained(out)
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(found) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    load(out).save_pretrained(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == found


def test_a_deep_copy_saves_itself(tmp_path: Path) -> None:
    model = quantized()
    other = copy.deepcopy(model)
    other.backbone.layers[0].mixer.D.zero_()
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert_same(load(tmp_path / "other"), other)
    assert_same(load(tmp_path / "model"), model)
    assert not torch.equal(logits(other), logits(model))


def test_the_generation_config_travels(tmp_path: Path) -> None:
    model = quantized()
    model.generation_config = GenerationConfig(max_new_tokens=7, top_k=3)
    save(model, tmp_path)
    assert load(tmp_path).generation_config.max_new_tokens == 7
    path = tmp_path / "generation_config.json"
    for text in ("{", '{"compile_config": 3}', "[]"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=str(path)):
            load(tmp_path)
    path.unlink()
    assert_same(load(tmp_path), model)


def test_another_dtype_leaves_integers_and_scales_alone(tmp_path: Path) -> None:
    model = quantized("jamba", "quamba-c", keep=("layers.1.dt",))
    save(model, tmp_path)
    found = load(tmp_path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        kept = layout.is_scale(name) or not tensor.is_floating_point()
        other = found.state_dict()[name]
        assert torch.equal(other, tensor if kept else tensor.to(torch.bfloat16)), name
        assert other.dtype == (tensor.dtype if kept else torch.bfloat16)
    assert float((logits(found).float() - logits(model)).norm() / logits(model).norm()) < 0.5
    found.save_pretrained(tmp_path)
    assert_same(load(tmp_path), found)


def test_float_weights_of_quantized_parts_are_never_held(tmp_path: Path) -> None:
    model = quantized("mamba", "quamba", dtype=torch.float32)
    save(model, tmp_path)
    seen: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not out.is_meta and out.is_floating_point():
                seen.append(tuple(out.shape))
            return out

    with Watch():
        found = load(tmp_path)
    assert_same(found, model)
    assert (48, 5) in seen
    floats = {tuple(t.shape) for t in model.state_dict().values() if t.is_floating_point()}
    integers = {tuple(t.shape) for t in model.state_dict().values() if not t.is_floating_point()}
    assert not set(seen) & integers
    assert floats <= set(seen)
