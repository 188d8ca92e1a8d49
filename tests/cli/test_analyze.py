"""quamba analyze, as a person runs it."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from quamba.analysis import report
from quamba.analysis.report import sections
from quamba.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = (
    *("--context", 16, "--samples", 4, "--windows", 3, "--sequences", 2),
    *("--long-context", 24, "--long-sequences", 2, "--batch-size", 2),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=4096, hidden_size=24, num_hidden_layers=2, state_size=4, tie_word_embeddings=True)
    MambaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLES / "mamba-books").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((EXAMPLES / "texts" / "evaluation.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["analyze", *(str(argument) for argument in arguments)])


def test_writes_a_report(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    # Drawing all figures takes seconds; tests/analysis/test_report.py does it.
    monkeypatch.setattr(report, "sections", lambda found: islice(sections(found), 1))
    out = tmp_path / "out"
    result = run(model, "--text", text, "--out", out, *SMALL, "--recipe", "clip", "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content == json.loads((out / "summary.json").read_text())
    assert content["title"] == "small"
    assert [recipe["name"] for recipe in content["about"]["recipes"]] == ["clip"]
    assert content["about"]["calibration_tokens"] == 64
    assert content["about"]["dtype"] == "float32"
    assert "report.html: written in" in result.stderr
    table = run(model, "--text", text, "--calib", text, "--out", out, *SMALL, "--recipe", "naive")
    assert table.exit_code == 0, table.stderr
    # The title wraps wherever the length of the model's path has it wrap.
    assert "one tensor quantized" in " ".join(table.stdout.split())
    assert "head.weight" in table.stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--samples", 9999), "of which calibration takes 159984"),
        (("--windows", 9999), "to evaluate on; expected at least"),
        (("--recipe", "mamba-had"), "rotates the residual stream"),
    ],
)
def test_failure_is_one_line(options: tuple[object, ...], reason: str, model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the command needs matplotlib")
    result = run(model, "--text", text, "--out", tmp_path / "out", *SMALL, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert reason in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_fails_before_the_work(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(model, "--text", text, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 1
    assert "pip install 'quamba[analysis]'" in result.stderr


@pytest.mark.parametrize("options", [("--recipe", "none-such"), ("--context", 1)])
def test_wrong_usage(options: tuple[object, ...], model: Path, text: Path, tmp_path: Path) -> None:
    assert run(model, "--text", text, "--out", tmp_path / "out", *options).exit_code == 2
