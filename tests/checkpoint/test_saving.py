"""Saving: what it refuses, its options, and what attach says in a model."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quamba
from quamba.checkpoint import attach, load, save
from quamba.convert import build_skeleton
from quamba.errors import CheckpointError, RecipeError
from quamba.models import find_adapter
from quamba.quantization import Quantization
from tests.checkpoint.files import assert_same, quantized
from tests.tiny import make_model

SCALE = "backbone.layers.1.mixer.x_scale"


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


def test_a_simulation_is_not_saved(tmp_path: Path) -> None:
    model = quantized(recipe="quamba-w4a4")
    for write in (model.save_pretrained, lambda path: save(model, path)):
        with pytest.raises(CheckpointError, match=r"recipe 'quamba-w4a4 \(simulation\)'; expected int8 values to save"):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="rounds to fewer bits in float; expected one of int8 values"):
        build_skeleton(find_adapter(make_model("mamba")), make_model("mamba"), quamba.RECIPES["quamba-w4a4"])


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


def test_attach_says_how_a_model_was_quantized() -> None:
    model = quantized()
    assert isinstance(model.quantization, Quantization)
    other = Quantization(recipe=quamba.RECIPES["naive"], statistics={})
    attach(model, other)
    assert model.quantization is other
    assert model.config.quantization_config.to_dict()["recipe"]["name"] == "naive"
