"""The format as docs/checkpoint.md describes it, read here without the package's code."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.files import contents, quantized
from tests.tiny import VOCABULARY

E, D, N, K, R = 24, 48, 5, 4, 3
WEIGHTS = {"in_proj": (2 * D, E), "x_proj": (R + 2 * N, D), "dt_proj": (D, R), "out_proj": (E, D)}
Form = tuple[str, list[int]]


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


@pytest.mark.parametrize("size", ["1GB", "10KB"])
def test_checksums_are_the_documented_ones(tmp_path: Path, size: str) -> None:
    model = quantized("mamba", "quamba-c", dtype=torch.bfloat16)
    model.config.eos_token_id = 5
    model.save_pretrained(tmp_path, max_shard_size=size)
    config = json.loads((tmp_path / "config.json").read_text())
    free = ("transformers_version", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id")
    assert config["eos_token_id"] == 5
    sealed = {key: value for key, value in config.items() if key not in free}
    text = json.dumps(sealed, sort_keys=True, separators=(",", ":"))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "10KB")
    for path in files:
        header, data = header_of(path)
        metadata = header.pop("__metadata__")
        found = metadata.pop("quamba.tensors").split(" ")
        assert metadata == {"format": "pt", "quamba.format_version": "1", "quamba.config": checksum(text.encode())}
        assert len(found) == len(header)
        for (name, entry), text_found in zip(
            sorted(header.items(), key=lambda item: item[1]["data_offsets"]), found, strict=True
        ):
            begin, end = entry["data_offsets"]
            shape = ",".join(map(str, entry["shape"]))
            label = f'["{name}","{entry["dtype"]}",[{shape}]]\n'
            assert text_found == checksum(label.encode() + data[begin:end])
            assert len(text_found) == 43


def forms(path: Path) -> dict[str, Form]:
    header, _ = header_of(path / "model.safetensors")
    return {name: (value["dtype"], value["shape"]) for name, value in header.items() if name != "__metadata__"}


def mixer(prefix: str, *, channels: tuple[str, ...], biased: bool) -> dict[str, Form]:
    """The documented tensors of a quantized mixer in bfloat16."""
    found: dict[str, Form] = {
        "norm_weight": ("BF16", [E]),
        "conv_qweight": ("I8", [D, K]),
        "conv_weight_scale": ("F32", [D]),
        "dt_bias": ("BF16", [D]),
        "A_log": ("BF16", [D, N]),
        "D": ("BF16", [D]),
    }
    for name, shape in WEIGHTS.items():
        found[f"{name}.qweight"] = ("I8", list(shape))
        found[f"{name}.weight_scale"] = ("F32", list(shape[:1]))
    for site in ("u", "x0", "z", "x", "d", "B", "C", "dt", "g"):
        found[f"{site}_scale"] = ("F32", [D] if site in channels else [])
    if channels:
        found["g_divisor"] = ("BF16", [D])
    if biased:
        found |= {"conv_bias": ("BF16", [D]), "in_proj.bias": ("BF16", [2 * D]), "out_proj.bias": ("BF16", [E])}
    return {prefix + name: form for name, form in found.items()}


@pytest.mark.parametrize(("recipe", "channels"), [("quamba", ()), ("quamba-c", ("x0", "z", "x", "dt"))])
@pytest.mark.parametrize("family", ["mamba", "mamba-biased"])
def test_tensors_are_the_documented_ones(tmp_path: Path, family: str, recipe: str, channels: tuple[str, ...]) -> None:
    quantized(family, recipe, dtype=torch.bfloat16).save_pretrained(tmp_path)
    expected: dict[str, Form] = {
        "backbone.embeddings.qweight": ("I8", [VOCABULARY, E]),
        "backbone.embeddings.weight_scale": ("F32", [VOCABULARY]),
        "backbone.norm_f.weight": ("BF16", [E]),
        "lm_head.input_scale": ("F32", [E] if channels else []),
    }
    if channels:
        expected["backbone.embeddings.column_scale"] = ("F32", [E])
    for layer in range(3):
        expected |= mixer(f"backbone.layers.{layer}.mixer.", channels=channels, biased=family == "mamba-biased")
    found = forms(tmp_path)
    guard = set(found) - set(expected)
    assert [found.pop(name) for name in guard] == [("U8", [0])]
    assert found == expected
    assert min(guard).startswith(("backbone.", "lm_head."))


def test_a_float_layer_has_the_documented_names(tmp_path: Path) -> None:
    quantized("mamba-biased", keep=["layers.1"]).save_pretrained(tmp_path)
    prefix = "backbone.layers.1.mixer."
    found = {name.removeprefix(prefix): form for name, form in forms(tmp_path).items() if name.startswith(prefix)}
    assert found == {
        "norm.weight": ("F32", [E]),
        "in_proj.weight": ("F32", [2 * D, E]),
        "in_proj.bias": ("F32", [2 * D]),
        "conv.weight": ("F32", [D, K]),
        "conv.bias": ("F32", [D]),
        "x_proj.weight": ("F32", [R + 2 * N, D]),
        "dt_proj.weight": ("F32", [D, R]),
        "dt_bias": ("F32", [D]),
        "A_log": ("F32", [D, N]),
        "D": ("F32", [D]),
        "out_proj.weight": ("F32", [E, D]),
        "out_proj.bias": ("F32", [E]),
    }


def test_scales_times_integers_are_the_weights(tmp_path: Path) -> None:
    model = quantized("mamba", "naive")
    model.save_pretrained(tmp_path)
    found = contents(tmp_path / "model.safetensors")
    mixer = model.backbone.layers[0].mixer
    for name in WEIGHTS:
        prefix = f"backbone.layers.0.mixer.{name}."
        weight = found[prefix + "qweight"].float() * found[prefix + "weight_scale"][:, None]
        assert torch.equal(weight, getattr(mixer, name).float_weight())
