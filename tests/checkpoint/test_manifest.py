"""Every damage of a checkpoint is an error that names the file and the tensor."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from quamba.checkpoint import container, layout, load, save
from quamba.errors import CheckpointError
from tests.checkpoint.files import assert_same, contents, metadata, quantized, rewrite, rewrite_config

SCALE = "backbone.layers.1.mixer.x_scale"
QWEIGHT = "backbone.layers.0.mixer.in_proj.qweight"


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


def seal(**changes: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        found = metadata(weights(path)) | {name.replace("_", ".", 1): text for name, text in changes.items()}
        tensors = contents(weights(path))
        weights(path).unlink()
        container.write(weights(path), tensors, found)

    return change


def write_config(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: (path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def resaved_by_others(path: Path) -> None:
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
    "unknown version of the seal": (seal(quamba_format_version="2"), "model.safetensors.*format_version '2'"),
    "checksums of fewer tensors": (seal(quamba_tensors="x"), "model.safetensors.*found 1 checksums"),
    "other checksums": (seal(quamba_config="x"), "config.json.*checksum"),
    "more metadata": (seal(more="x"), "model.safetensors.*metadata.*more"),
    "another framework": (seal(format="tf"), "metadata"),
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
    with pytest.raises(CheckpointError, match=r"config.json.*[Pp]adding"):
        load(tmp_path)


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json.*cannot be read"):
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
