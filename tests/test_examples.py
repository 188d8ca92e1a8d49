"""What ships with the project: the model, the texts, the quickstart."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from quamba.eval import perplexity
from quamba.text import read_ids

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "mamba-books"
TEXTS = EXAMPLES / "texts"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_what_its_readme_says() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("mamba", 256, 8)
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert round(sum(tensor.numel() for tensor in tensors) / 1e6, 2) == 4.55


def test_the_texts_share_no_passage_and_are_long_enough(tokenizer: Any) -> None:
    calibration, evaluation = (
        (TEXTS / f"{name}.txt").read_text(encoding="utf-8") for name in ("calibration", "evaluation")
    )
    assert len(read_ids(tokenizer, TEXTS / "calibration.txt")) >= 128 * 512
    lines = {line for line in calibration.splitlines() if len(line) > 40}
    assert not lines & set(evaluation.splitlines())
    for text in (calibration, evaluation):
        assert all(part.strip() for part in text.split("<|endoftext|>"))


def test_the_end_of_text_is_one_token(tokenizer: Any) -> None:
    ids = read_ids(tokenizer, TEXTS / "evaluation.txt")
    assert (
        int((ids == tokenizer.eos_token_id).sum()) == (TEXTS / "evaluation.txt").read_text().count("<|endoftext|>") == 2
    )


def test_the_default_recipe_keeps_the_trained_model(tokenizer: Any) -> None:
    calibration = read_ids(tokenizer, TEXTS / "calibration.txt")[: 16 * 128].view(16, 128)
    evaluation = read_ids(tokenizer, TEXTS / "evaluation.txt")[: 8 * 128]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    expected = perplexity(model, evaluation, context=128, progress=False).perplexity
    # A model that learned nothing is near the size of its vocabulary, 4096.
    assert expected < 80
    quamba.quantize(model, [calibration])
    assert perplexity(model, evaluation, context=128, progress=False).perplexity < 1.03 * expected


def test_quickstart(quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(sequences=4, evaluated=300, tokens=4, out=tmp_path / "out")
    printed = capsys.readouterr().out
    for expected in ("float", "naive, INT8", "9.11 MB", "bit for bit", quickstart.PROMPT):
        assert expected in printed
    assert quamba.load(tmp_path / "out").quantization.recipe.name == quickstart.DEFAULT_RECIPE
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 0.53 * (MODEL / "model.safetensors").stat().st_size
