"""The command line: what it writes, where it writes it, and its exit codes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

import quamba
from quamba.cli import app
from quamba.cli.common import size
from quamba.eval import perplexity
from quamba.eval.provenance import model_sha256
from quamba.recipe import QuantSpec
from quamba.recipes import DEFAULT_RECIPE
from quamba.text import calibration_sequences, read_ids
from tests.shipped import EXAMPLES, TOKENIZER_FILES, text_of


@pytest.fixture(scope="module")
def quantized(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "quantized"
    result = run("quantize", model, out, "--calib", text, "--samples", 5, "--seq-len", 32)
    assert result.exit_code == 0, result.stderr
    return out


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def ids_of(model: Path, text: Path) -> torch.Tensor:
    return read_ids(AutoTokenizer.from_pretrained(model), text)


def test_quantize_does_what_the_function_does(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    options = ("--recipe", "clip", "--samples", 7, "--seq-len", 24, "--percentile", 0.97)
    result = run("quantize", model, out, "--calib", text, *options, "--keep", "layers.0", "--keep", "layers.1.B")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "7 sequences, 168 tokens" in result.stderr

    expected = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = calibration_sequences(str(text), tokenizer, length=24, count=7)
    quamba.quantize(expected, data, "clip", percentile=0.97, keep=["layers.0", "layers.1.B"])
    found = quamba.load(out)
    assert found.quantization == expected.quantization
    assert found.quantization.recipe.spec("layers.1.x") == QuantSpec("tensor", "percentile", 0.97)
    sample = ids_of(model, text)[None, :40]
    with torch.no_grad():
        assert torch.equal(found(sample).logits, expected(sample).logits)
    assert AutoTokenizer.from_pretrained(out)("some words")["input_ids"] == tokenizer("some words")["input_ids"]


def test_quantize_takes_a_recipe_file_and_a_dtype(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = quamba.RECIPES["naive"].to_dict() | {"name": "mine"}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    options = ("--calib", text, "--seq-len", 32, "--recipe", tmp_path / "mine.json", "--dtype", "float32")
    result = run("quantize", model, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    found = quamba.load(tmp_path / "out")
    assert found.quantization.recipe.name == "mine"
    assert found.dtype == torch.float32


def test_quantize_searches_the_percentile(model: Path, text: Path, tmp_path: Path) -> None:
    options = ("--calib", text, "--seq-len", 32, "--samples", 4, "--percentile", "search")
    result = run("quantize", model, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    patterns = [override.pattern for override in quamba.load(tmp_path / "out").quantization.recipe.overrides]
    assert patterns == ["layers.0.x", "layers.1.x"]


def test_quantize_without_text_where_nothing_is_static(model: Path, tmp_path: Path) -> None:
    assert run("quantize", model, tmp_path / "out", "--recipe", "dynamic").exit_code == 0
    assert quamba.load(tmp_path / "out").quantization.recipe.name == "dynamic"


def test_quantize_reads_a_dataset(model: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [i, i + 1, i + 2]} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(
        "quantize", model, tmp_path / "out", "--calib", tmp_path / "rows.jsonl", "--seq-len", 2, "--samples", 4
    )
    assert result.exit_code == 0, result.stderr
    assert "4 sequences, 8 tokens" in result.stderr


def test_quantize_replaces_a_quantized_model_and_no_other(model: Path, quantized: Path, tmp_path: Path) -> None:
    out = shutil.copytree(quantized, tmp_path / "out")
    assert run("quantize", model, out, "--recipe", "dynamic").exit_code == 0
    assert quamba.load(out).quantization.recipe.name == "dynamic"
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    result = run("quantize", model, model, "--recipe", "dynamic")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "the model to quantize" in result.stderr
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_eval_is_the_perplexity(kind: str, model: Path, quantized: Path, text: Path) -> None:
    folder = model if kind == "float" else quantized
    options = ("--context", 48, "--stride", 20, "--limit", 3, "--batch-size", 2)
    found = one_line(run("eval", folder, "--text", f"mine={text}", "--text", f"{text}:100:", *options, "--json"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = perplexity(loaded, ids_of(model, text)[:88], context=48, stride=20, batch_size=2)
    first, second = found["texts"]
    assert (first["name"], second["name"]) == ("mine", "text")
    assert first["perplexity"] == expected.perplexity
    assert first["nll"] == expected.nll
    assert (first["tokens"], first["windows"], first["context"], first["stride"]) == (87, 3, 48, 20)
    deviation = expected.window_nll - expected.nll
    share = expected.window_tokens / 87
    assert first["nll_stderr"] == pytest.approx(float((share * deviation).square().sum() * 3 / 2) ** 0.5)
    other = perplexity(loaded, ids_of(model, text)[100:188], context=48, stride=20, batch_size=2)
    assert second["perplexity"] == other.perplexity
    assert found["model_sha256"] == model_sha256(loaded)
    assert found["recipe"] == (None if kind == "float" else DEFAULT_RECIPE)
    assert {"date", "hardware", "seeds"} <= set(found)
    plain = run("eval", folder, "--text", text, *options)
    assert f" {expected.perplexity:.4f} ± " in plain.stdout
    assert plain.stderr == ""


def test_eval_scores_tasks(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'quamba[eval]'")
    rows = [{"text": text_of(80, start=start)} for start in range(0, 500, 100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = f"{EXAMPLES}/tasks/last_word.json={tmp_path}/rows.jsonl"
    found = one_line(run("eval", model, "--task", task, "--limit", 4, "--json"))
    assert found["texts"] == []
    (scored,) = found["tasks"]
    assert (scored["name"], scored["documents"], scored["batch_size"]) == ("last_word", 4, 8)
    assert set(scored["metrics"]) == {"acc", "perplexity"}
    assert "last_word" in run("eval", model, "--task", task, "--text", text, "--limit", 2).stdout


def test_generate_continues_the_prompt(quantized: Path) -> None:
    result = run("generate", quantized, "--prompt", "The old house", "--max-new-tokens", 6)
    loaded, tokenizer = quamba.load(quantized), AutoTokenizer.from_pretrained(quantized)
    ids = loaded.generate(**tokenizer("The old house", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_generate_samples_by_the_seed(model: Path) -> None:
    def text_of(*options: object) -> str:
        result = run("generate", model, "--prompt", "The old house", "--max-new-tokens", 8, *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    sampled = text_of("--temperature", 1.5, "--seed", 1)
    assert sampled == text_of("--temperature", 1.5, "--seed", 1)
    assert sampled != text_of("--temperature", 1.5, "--seed", 2)
    # Of so small a share of the probability only the likeliest token is left.
    assert text_of("--temperature", 1.5, "--top-p", 1e-6) == text_of()


def test_inspect(model: Path, quantized: Path) -> None:
    found = one_line(run("inspect", quantized, "--json"))
    assert found["recipe"] == quamba.load(quantized).quantization.recipe.name
    assert {site["address"] for site in found["sites"]} >= {"layers.0.u", "layers.1.g", "head.input"}
    assert one_line(run("inspect", model, "--json"))["recipe"] is None
    tables = run("inspect", quantized).stdout
    for expected in ("layers.1.dt", "SQNR", "Mamba blocks", "backbone.norm_f", "the norm before the head"):
        assert expected in tables
    assert "not quantized" in run("inspect", model).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("quantize", "model"),
        ("quantize", "model", "out", "--recipe", "none-such"),
        ("quantize", "model", "out", "--recipe", "quamba-w4a4"),
        ("quantize", "model", "out", "--recipe", "absent.json"),
        ("quantize", "model", "out", "--percentile", "most"),
        ("quantize", "model", "out", "--percentile", "99.9"),
        ("quantize", "model", "out", "--samples", "0"),
        ("quantize", "model", "out", "--dtype", "int8"),
        ("eval", "model"),
        ("eval", "model", "--text", "absent.txt"),
        ("eval", "model", "--text", __file__, "--batch-size", "0"),
        ("eval", "model", "--text", __file__, "--text", __file__),
        ("eval", "model", "--task", "absent.json=data"),
        ("eval", "model", "--task", "piqa", "--task", "piqa"),
        ("compare", "model", "--recipes", "naive"),
        ("compare", "model", "--recipes", "none-such", "--text", __file__),
        ("compare", "model", "--text", __file__, "--json", "--markdown"),
        ("eval", "model", "--text", __file__, "--context", "1"),
        ("eval", "model", "--text", __file__, "--context", "8", "--stride", "9"),
        ("generate", "model"),
        ("generate", "model", "--prompt", "a", "--top-p", "2"),
        ("inspect", "model", "--verbose"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error" in result.stderr


def truncated(model: Path, quantized: Path, scratch: Path) -> tuple[object, ...]:
    folder = shutil.copytree(quantized, scratch / "cut")
    os.truncate(folder / "model.safetensors", 1000)
    return "eval", folder, "--text", __file__


def foreign(model: Path, quantized: Path, scratch: Path) -> tuple[object, ...]:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **size)).save_pretrained(scratch / "llama")
    for name in TOKENIZER_FILES:
        shutil.copy(model / name, scratch / "llama")
    return "quantize", scratch / "llama", scratch / "out", "--recipe", "dynamic"


def not_json(model: Path, quantized: Path, scratch: Path) -> tuple[object, ...]:
    (scratch / "config.json").write_text("{")
    return "inspect", scratch


Case = Callable[[Path, Path, Path], tuple[object, ...]]
FAILURES: dict[str, tuple[Case, str]] = {
    "no such model": (lambda m, q, s: ("inspect", s / "absent"), "found no folder"),
    "no such text": (lambda m, q, s: ("quantize", m, s / "out", "--calib", s / "absent.txt"), "absent.txt"),
    "no text": (lambda m, q, s: ("quantize", m, s / "out"), "calib_data"),
    "text too short": (lambda m, q, s: ("quantize", m, s / "out", "--calib", m / "config.json"), "config.json"),
    "a glob without match": (
        lambda m, q, s: ("quantize", m, s / "out", "--recipe", "dynamic", "--keep", "layers.9"),
        "'layers.9' matches nothing",
    ),
    "quantized already": (lambda m, q, s: ("quantize", q, s / "out", "--recipe", "dynamic"), "already"),
    "a truncated checkpoint": (truncated, "model.safetensors"),
    "another architecture": (foreign, "'llama'"),
    "a broken config": (not_json, "not JSON"),
    "compare without a calibration": (
        lambda m, q, s: ("compare", m, "--text", __file__, "--state", s / "state.json", "--recipes", "naive"),
        "--calib",
    ),
    "compare a quantized model": (
        lambda m, q, s: ("compare", q, "--text", __file__, "--state", s / "state.json"),
        "the float model",
    ),
    "an empty prompt": (lambda m, q, s: ("generate", m, "--prompt", ""), "without tokens"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_exit_code_1_and_one_line(name: str, model: Path, quantized: Path, tmp_path: Path) -> None:
    case, reason = FAILURES[name]
    arguments = case(model, quantized, tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("quamba: ")
    assert reason in last
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_debug_lets_the_error_through(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "absent", "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, quamba.errors.QuambaError)


def test_version() -> None:
    result = run("--version")
    version, cpu, cuda = result.stdout.splitlines()
    assert (result.exit_code, version) == (0, f"quamba {quamba.__version__}")
    assert cpu == f"CPU ops: {quamba.ops.native.description()}"
    assert cuda.startswith("CUDA ops: ")


def test_as_a_process_stdout_is_the_result_and_stderr_is_empty(quantized: Path, text: Path) -> None:
    program = [sys.executable, "-c", "from quamba.cli import main; main()"]
    done = subprocess.run(
        [*program, "eval", str(quantized), "--text", str(text), "--limit", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["texts"][0]["windows"] == 1
    done = subprocess.run([*program, "inspect", "./absent"], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "quamba: found no folder './absent'; expected a local folder with a model, or a hub name\n"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4831838, "4.83 MB"), (2.76e9, "2.76 GB"), (5.2e13, "52000.00 GB")],
)
def test_size(count: float, expected: str) -> None:
    assert size(count) == expected
