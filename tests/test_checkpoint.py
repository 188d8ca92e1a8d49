"""Checkpoints: bit-equal after loading, every damage named, and a save that fails leaves the old one whole."""

import copy
import dataclasses
import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

import quamba
from quamba.checkpoint import attach, container, directory, layout, load, save
from quamba.errors import CheckpointError
from quamba.nn.mixer import Mixer
from quamba.quantization import Quantization
from tests.checkpoint.files import contents, logits, metadata, quantized, rewrite, rewrite_config
from tests.tiny import FAMILIES, VOCABULARY, make_model, token_ids

SCALE = "backbone.layers.1.mixer.x_scale"
QWEIGHT = "backbone.layers.0.mixer.in_proj.qweight"


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert list(one) == list(other)
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype
        assert torch.equal(one[name], tensor), name
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", quamba.RECIPES)
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
        assert set(json.loads(metadata(shard)["quamba"])["tensors"]) == set(contents(shard))
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


# ---- what save refuses -------------------------------------------------------------------------------------------


def cast(model: Any) -> None:
    nn.Module.to(model, torch.float16)


def set_scale(value: float) -> Callable[[Any], None]:
    return lambda model: model.backbone.layers[1].mixer.x_scale.fill_(value)


def add_module(model: Any) -> None:
    model.extra = nn.Linear(2, 2)


def drop_buffer(model: Any) -> None:
    del model.backbone.layers[1].mixer.x_scale


def change_config(model: Any) -> None:
    model.config.vocab_size = 7


def offload(model: Any) -> None:
    model.backbone.layers[1].mixer.D = model.backbone.layers[1].mixer.D.to("meta")


def widen(model: Any) -> None:
    model.config.hidden_act = "relu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast, "dtype torch.float16"),
        (set_scale(float("nan")), SCALE),
        (set_scale(float("inf")), SCALE),
        (set_scale(0.0), SCALE),
        (set_scale(-1.0), SCALE),
        (add_module, "extra"),
        (drop_buffer, SCALE),
        (change_config, "shape"),
        (offload, "no values"),
        (widen, "hidden_act"),
        (lambda model: delattr(model, "quantization"), "has not quantized"),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    model, out = quantized(), tmp_path / "out"
    save(model, out)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    changed = copy.deepcopy(model)
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        changed.save_pretrained(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert os.listdir(tmp_path) == ["out"]


def test_a_float_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="MambaForCausalLM that quamba has not quantized"):
        save(make_model("mamba"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_options_of_save_pretrained(tmp_path: Path) -> None:
    model, out = quantized(), tmp_path / "out"
    model.save_pretrained(out, is_main_process=False)
    assert not out.exists()
    for option in ({"push_to_hub": True}, {"variant": "fp16"}, {"state_dict": {}}, {"unheard_of": None}):
        with pytest.raises(CheckpointError, match=next(iter(option))):
            model.save_pretrained(out, **option)
    assert not out.exists()
    model.save_pretrained(str(out), push_to_hub=False, safe_serialization=True, token=None)
    assert_same(load(str(out)), model)


# ---- what load refuses -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(quantized(), tmp_path / "out")
    return tmp_path / "out"


def weights(path: Path) -> Path:
    return path / layout.WEIGHTS


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def flip_in_tensor(path: Path) -> None:
    with weights(path).open("rb") as file:
        entries, _ = container.read_header(file, weights(path))
    flip(weights(path), entries[QWEIGHT].begin + 3)


def flip_in_header(path: Path) -> None:
    flip(weights(path), weights(path).read_bytes().index(QWEIGHT.encode()))


def truncate(path: Path) -> None:
    os.truncate(weights(path), weights(path).stat().st_size - 1)


def swap(tensors: dict[str, Tensor]) -> None:
    one, other = "backbone.layers.0.mixer.D", "backbone.layers.1.mixer.D"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def swap_labels(path: Path) -> None:
    """Exchange two names everywhere in the file, the checksums included."""
    one, other = b"layers.0.mixer.D", b"layers.1.mixer.D"
    data, spare = weights(path).read_bytes(), b"layers.?.mixer.?"
    assert spare not in data
    weights(path).write_bytes(data.replace(one, spare).replace(other, one).replace(spare, other))


def put(name: str, value: Tensor | Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = value if isinstance(value, Tensor) else value(tensors[name])

    return lambda path: rewrite(path, change)


def config(change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> Callable[[Path], None]:
    return lambda path: rewrite_config(path, change, sealed=sealed)


def ours(**changes: Any) -> Callable[[Path], None]:
    return config(lambda content: content["quantization_config"].update(changes))


def seal(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        found = metadata(weights(path))
        content = json.loads(found["quamba"]) | changes
        tensors = contents(weights(path))
        weights(path).unlink()
        container.write(weights(path), tensors, found | {"quamba": json.dumps(content)})

    return change


def write_config(text: str | bytes) -> Callable[[Path], None]:
    return lambda path: (path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def resaved_by_others(path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(contents(weights(path)), weights(path), {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "model.safetensors.*bytes"),
    "emptied": (lambda path: weights(path).write_bytes(b""), "model.safetensors.*header length"),
    "flipped bit in a tensor": (flip_in_tensor, f"model.safetensors.*{QWEIGHT}.*checksum"),
    "flipped bit in the header": (flip_in_header, "model.safetensors.*tensor"),
    "swapped": (lambda path: rewrite(path, swap, sealed=False), "layers.*mixer.D.*checksum"),
    "mislabelled": (swap_labels, "layers.*mixer.D.*checksum"),
    "missing": (lambda path: rewrite(path, lambda t: t.pop(SCALE)), f"found no tensor '{SCALE}'"),
    "missing without a word": (lambda path: rewrite(path, lambda t: t.pop(SCALE), sealed=False), SCALE),
    "surplus": (put("backbone.more", torch.ones(2)), "model.safetensors.*backbone.more"),
    "surplus scale": (put("lm_head.weight_scale", torch.ones(97)), "lm_head.weight_scale"),
    "wrong shape": (put(QWEIGHT, lambda t: t.T), f"{QWEIGHT}.*shape"),
    "wrong dtype": (put(QWEIGHT, lambda t: t.float()), f"{QWEIGHT}.*dtype torch.float32.*torch.int8"),
    "wrong float dtype": (put("backbone.layers.0.mixer.D", lambda t: t.half()), "D.*dtype torch.float16"),
    "scale of another dtype": (put(SCALE, lambda t: t.half()), f"{SCALE}.*dtype torch.float16"),
    "NaN scale": (put(SCALE, torch.tensor(float("nan"))), f"model.safetensors.*{SCALE}.*NaN"),
    "infinite scale": (put(SCALE, torch.tensor(float("inf"))), f"{SCALE}.*infinite"),
    "zero scale": (put(SCALE, torch.tensor(0.0)), f"{SCALE}.*not positive"),
    "negative scale": (put(QWEIGHT.replace("q", "") + "_scale", lambda t: -t), "weight_scale.*not positive"),
    "unknown version": (ours(format_version=2), "config.json.*format_version 2.*expected 1"),
    "version of another type": (ours(format_version=True), "format_version True"),
    "unknown version of the seal": (seal(format_version=2), "model.safetensors.*format_version 2"),
    "malformed checksums": (seal(tensors=[]), "checksums"),
    "another method": (ours(quant_method="gptq"), "quant_method"),
    "no quantization_config": (config(lambda c: c.pop("quantization_config")), "quantization_config"),
    "no recipe": (config(lambda c: c["quantization_config"].pop("recipe")), "config.json.*recipe"),
    "more keys": (ours(more=1), "config.json.*more"),
    "malformed recipe": (config(lambda c: c["quantization_config"]["recipe"].pop("weights")), "malformed recipe"),
    "unhashable recipe": (ours(recipe={"name": "x", "activations": {"u": {"granularity": []}}}), "config.json"),
    "malformed statistics": (ours(statistics={"layers.0.x": {"alpha": 1}}), "malformed quantization"),
    "override of nothing": (
        config(lambda c: c["quantization_config"]["recipe"]["overrides"].append({"pattern": "layers.9", "spec": None})),
        "layers.9",
    ),
    "no dtype": (config(lambda c: c.pop("dtype")), "dtype None"),
    "dtype of integers": (config(lambda c: c.update(dtype="int8")), "dtype 'int8'"),
    "no model type": (config(lambda c: c.pop("model_type")), "config.json.*model_type"),
    "unknown model type": (config(lambda c: c.update(model_type="eliza")), "config.json.*eliza"),
    "unsupported model type": (config(lambda c: c.update(model_type="gpt2")), "config.json.*gpt2"),
    "impossible size": (config(lambda c: c.update(hidden_size=-4)), "config.json"),
    "size of another type": (config(lambda c: c.update(hidden_size="many")), "config.json"),
    "another size": (config(lambda c: c.update(state_size=6)), "shape"),
    "another depth": (config(lambda c: c.update(num_hidden_layers=2)), "layers.2"),
    "changed epsilon": (config(lambda c: c.update(layer_norm_epsilon=0.5), sealed=False), "config.json.*checksum"),
    "changed recipe": (
        config(lambda c: c["quantization_config"]["recipe"].update(name="mine"), sealed=False),
        "config.json.*checksum",
    ),
    "config is not JSON": (write_config('{"model_type": '), "config.json.*not JSON"),
    "config is not an object": (write_config("[]"), "config.json.*JSON object"),
    "config is not text": (write_config(b"\xff\xfe{}"), "config.json.*not JSON"),
    "config has a key twice": (write_config('{"dtype": 1, "dtype": 2}'), "config.json.*twice"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json.*cannot be read"),
    "config is a directory": (
        lambda path: ((path / "config.json").unlink(), (path / "config.json").mkdir()),
        "config.json.*cannot be read",
    ),
    "no weights": (lambda path: weights(path).unlink(), "neither of model.safetensors"),
    "weights are a directory": (lambda path: (weights(path).unlink(), weights(path).mkdir()), "cannot be read"),
    "weights and index": (lambda path: (path / layout.INDEX).write_text("{}"), "both of model.safetensors"),
    "saved again by others": (resaved_by_others, "metadata"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(saved: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(saved)
    with pytest.raises(CheckpointError, match=message) as error:
        load(saved)
    assert str(saved) in str(error.value)
    assert ";" in str(error.value), "the message says what to do"


def test_what_does_not_enter_the_logits_may_be_edited(saved: Path) -> None:
    changes = {"eos_token_id": 5, "bos_token_id": 6, "pad_token_id": 7, "transformers_version": "9.9"}
    rewrite_config(saved, lambda c: c.update(changes), sealed=False)
    found = load(saved)
    assert_same(found, quantized())
    assert found.config.eos_token_id == 5


def test_an_edit_that_no_model_can_be_built_from(tmp_path: Path) -> None:
    save(quantized("jamba"), tmp_path)
    rewrite_config(tmp_path, lambda c: c.update(pad_token_id=100_000), sealed=False)
    with pytest.raises(CheckpointError, match="config.json.*[Pp]adding"):
        load(tmp_path)


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json.*cannot be read"):
        load(tmp_path / "nothing")


def remove_shard(path: Path) -> None:
    min(path.glob("model-*")).unlink()


def exchange_shards(path: Path) -> None:
    one, other, *_ = sorted(path.glob("model-*"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads((path / layout.INDEX).read_text())
        change(content)
        (path / layout.INDEX).write_text(json.dumps(content))

    return edit


def shard_of_another_model(path: Path) -> None:
    save(quantized(recipe="hadamard"), path.parent / "other", max_shard_size="4KB")
    shard = min(path.glob("model-*")).name
    (path / shard).write_bytes((path.parent / "other" / shard).read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_shard, "model-00001-of-.*cannot be read"),
        (exchange_shards, "not in both"),
        (shard_of_another_model, "config.json.*checksum"),
        (index(lambda c: c.pop("weight_map")), "weight_map"),
        (index(lambda c: c["weight_map"].pop(SCALE)), SCALE),
        (index(lambda c: c["weight_map"].update({"more": c["weight_map"][SCALE]})), "more"),
        (index(lambda c: c["weight_map"].update({SCALE: "../model.safetensors"})), "file name"),
        (index(lambda c: c["weight_map"].update({SCALE: 3})), "file name"),
    ],
)
def test_damage_of_shards_is_named(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    out = tmp_path / "out"
    save(quantized(), out, max_shard_size="4KB")
    change(out)
    with pytest.raises(CheckpointError, match=message):
        load(out)


# ---- interrupted saves -------------------------------------------------------------------------------------------


class Injected(Exception):
    """Raised in place of a step of the save."""


# Every call of a save that changes the disk, or may fail on it.
STEPS = [(os, "mkdir"), (os, "link"), (os, "rename"), (os, "fsync"), (os, "open"), (os, "chmod"), (io, "open")]


class Steps:
    """Counts the steps of a save, and does something in place of the one with a given number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
        self.left = number
        self.action = action
        self.exchanged = False
        for module, name in [*STEPS, (directory, "_exchange")]:
            monkeypatch.setattr(module, name, self.counted(name, getattr(module, name)))
        monkeypatch.setattr(container, "raw", self.some(container.raw))
        monkeypatch.setattr(shutil, "rmtree", self.uncounted(shutil.rmtree))

    def some(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Counts one call in sixteen: there are two for every tensor."""
        calls, counted = itertools.count(), self.counted("raw", original)
        return lambda tensor: (original if next(calls) % 16 else counted)(tensor)

    def uncounted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The removal of what is left over may fail in silence; the next save removes it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            left, self.left = self.left, -1
            original(*args, **kwargs)
            self.left = left

        return call

    def counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.action()
            result = original(*args, **kwargs)
            self.exchanged |= name == "_exchange" and bool(result)
            return result

        return call


def interruptions(monkeypatch: pytest.MonkeyPatch, attempt: Callable[[], None]) -> Iterator[Steps]:
    """Interrupt an attempt at its first step, its second, ..., until one gets through."""

    def action() -> None:
        raise Injected

    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            steps = Steps(patch, number, action)
            try:
                attempt()
            except (Injected, CheckpointError):
                interrupted = True
            else:
                interrupted = False
        if not interrupted and steps.left > 0:
            assert number > 20
            return
        yield steps


@pytest.mark.parametrize("exchange", [True, False])
def test_an_interrupted_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    out = tmp_path / "out"
    old, new = quantized(seed=0), quantized(seed=1)
    expected = {"old": logits(old), "new": logits(new)}
    if not exchange:
        monkeypatch.setattr(directory, "_exchange", lambda one, other: False)
    save(old, out)
    (out / "tokenizer.json").write_text("kept")
    seen = set()
    for steps in interruptions(monkeypatch, lambda: save(new, out, max_shard_size="8KB")):
        found = logits(load(out))
        state = next(name for name, value in expected.items() if torch.equal(found, value))
        if exchange:
            assert state == ("new" if steps.exchanged else "old")
        seen.add(state)
        assert (out / "tokenizer.json").read_text() == "kept"
        assert os.listdir(tmp_path) == ["out"]
        if state == "new":
            save(old, out)
    assert seen == {"old", "new"}
    assert torch.equal(logits(load(out)), expected["new"])
    assert os.listdir(tmp_path) == ["out"]


def test_a_first_save_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = quantized(), tmp_path / "out"
    for _ in interruptions(monkeypatch, lambda: save(model, out)):
        if out.exists():
            assert torch.equal(logits(load(out)), logits(model))
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old, new, out = quantized(seed=0), quantized(seed=1), tmp_path / "out"
    save(old, out)
    whole = weights(out).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, whole // 2, whole - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save(new, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert torch.equal(logits(load(out)), logits(old))
        assert os.listdir(tmp_path) == ["out"]


KILLS = """
import itertools, os, signal, sys
from pathlib import Path
import pytest, torch
torch.set_num_threads(1)
from quamba.checkpoint import directory, load, save
from tests.checkpoint.files import logits, quantized
from tests.test_checkpoint import Steps

root, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    directory._exchange = lambda one, other: False
out = root / "out"
old, new = quantized(seed=0), quantized(seed=1)
expected = {"old": logits(old), "new": logits(new)}
save(old, out)
(out / "tokenizer.json").write_text("kept")
states = []
for number in itertools.count(1):
    child = os.fork()
    if child == 0:
        Steps(pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        save(new, out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = logits(load(out))
    states.append(next(name for name, value in expected.items() if torch.equal(found, value)))
    assert (out / "tokenizer.json").read_text() == "kept"
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    save(old, out)
    assert os.listdir(root) == ["out"], os.listdir(root)
print(len(states), states.index("new") == len(states) - states.count("new"), states.count("new"))
"""


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path, way: str) -> None:
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), way], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    attempts, monotonic, new = result.stdout.split()
    assert int(attempts) > 20
    assert monotonic == "True"
    assert int(new) > 1


def test_readers_never_see_a_mixture(tmp_path: Path) -> None:
    """Each state of the disk while a save runs is a whole checkpoint, also for somebody who reads in between."""
    out = tmp_path / "out"
    old, new = quantized(seed=0), quantized(seed=1)
    expected = [logits(old), logits(new)]
    save(old, out)
    with pytest.MonkeyPatch.context() as patch:
        exchange = directory._exchange

        def look(one: Path, other: Path) -> bool:
            assert torch.equal(logits(load(out)), expected[0])
            done = exchange(one, other)
            assert torch.equal(logits(load(out)), expected[1])
            return done

        patch.setattr(directory, "_exchange", look)
        save(new, out)
    assert_same(load(out), new)


def test_attach_says_how_a_model_was_quantized() -> None:
    model = quantized()
    assert isinstance(model.quantization, Quantization)
    other = Quantization(recipe=quamba.RECIPES["naive"], statistics={})
    attach(model, other)
    assert model.quantization is other
    assert model.config.quantization_config.to_dict()["recipe"]["name"] == "naive"


# ---- mamba-ssm ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MambaConfig:
    """Stands in for mamba_ssm's, with some of its fields."""

    d_model: int = 24
    n_layer: int = 2
    vocab_size: int = VOCABULARY
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    tie_embeddings: bool = True


class Block(nn.Module):
    """Stands in for mamba_ssm's Block and the Mamba inside, as far as the adapter looks."""

    residual_in_fp32 = True
    mlp = None

    def __init__(self, width: int) -> None:
        super().__init__()

        class RMSNorm(nn.Module):
            eps = 1e-5

            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(width))

        self.norm = RMSNorm()
        self.mixer = mixer = nn.Module()
        inner, state, rank, kernel = 2 * width, 5, 3, 4
        for name, value in {"d_model": width, "d_inner": inner, "d_state": state, "d_conv": kernel, "dt_rank": rank}.items():
            setattr(mixer, name, value)
        mixer.in_proj = nn.Linear(width, 2 * inner, bias=False)
        mixer.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        mixer.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        mixer.dt_proj = nn.Linear(rank, inner)
        # As in mamba_ssm, these two are float32 whatever the dtype of the model.
        mixer.A_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))
        mixer.D = nn.Parameter(torch.ones(inner))
        mixer.out_proj = nn.Linear(inner, width, bias=False)


class MambaLMHeadModel(nn.Module):
    """Stands in for mamba_ssm's."""

    def __init__(self, config: MambaConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.config = config
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype or previous)
        try:
            with torch.device(device or "cpu"):
                self.backbone = nn.Module()
                self.backbone.embedding = nn.Embedding(config.vocab_size, config.d_model)
                self.backbone.layers = nn.ModuleList(Block(config.d_model) for _ in range(config.n_layer))
                self.backbone.norm_f = nn.RMSNorm(config.d_model)
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        finally:
            torch.set_default_dtype(previous)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.backbone.forward = self.run

    def run(self, ids: Tensor) -> Tensor:
        hidden, residual = self.backbone.embedding(ids), None
        for layer in self.backbone.layers:
            hidden, residual = layer(hidden, residual)
        return self.backbone.norm_f((hidden + residual).to(self.backbone.norm_f.weight.dtype))

    def forward(self, ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.run(ids)))


@pytest.fixture
def _mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = ModuleType("config_mamba"), ModuleType("mixer_seq_simple")
    config.MambaConfig = MambaConfig  # type: ignore[attr-defined]
    model.MambaLMHeadModel = MambaLMHeadModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.models", ModuleType("models"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.models.config_mamba", config)
    monkeypatch.setitem(sys.modules, "mamba_ssm.models.mixer_seq_simple", model)


@pytest.mark.usefixtures("_mamba_ssm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [(), ("layers.1",), ("head", "embedding")])
def test_models_of_mamba_ssm(tmp_path: Path, keep: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = MambaLMHeadModel(MambaConfig(), dtype=dtype)
    quamba.quantize(model, [token_ids(2, 16)], keep=keep, progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mamba_ssm"
    assert config["d_model"] == 24
    found = load(tmp_path)
    assert_same(found, model)
    assert type(found) is MambaLMHeadModel
    assert found.config == model.config
    assert (found.lm_head.weight is found.backbone.embedding.weight) == ("head" in keep)
    other = load(tmp_path, dtype=torch.float16)
    assert other.backbone.norm_f.weight.dtype == torch.float16
    rewrite_config(tmp_path, lambda c: c.update(more=1))
    with pytest.raises(CheckpointError, match="config.json.*more"):
        load(tmp_path)


def test_models_of_mamba_ssm_need_mamba_ssm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("_mamba_ssm")
    model = quamba.quantize(MambaLMHeadModel(MambaConfig()), [token_ids(2, 16)], progress=False)
    save(model, tmp_path)
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError, match=r"config.json.*quamba\[mamba-ssm\]"):
        load(tmp_path)
