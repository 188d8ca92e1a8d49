"""quamba bench: what it prints and writes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quamba.cli import app
from tests.runtime.helpers import make
from tests.tiny import make_model

FEW = ["--device", "cpu", "--rounds", "1", "--runs", "2", "--new-tokens", "2", "--length", "4"]


def run(*arguments: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["bench", *arguments])
    return found.exit_code, found.stdout, found.stderr


def test_a_shape(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, err = run("--shape", "tiny", "--batch", "1,3", "--recipe", "naive", "--json", str(file), *FEW)
    assert code == 0, err
    content = json.loads(file.read_text())
    assert (content["model"], content["recipe"], content["dtype"]) == ("tiny", "naive", "float32")
    assert [(f["case"]["what"], f["case"]["batch"]) for f in content["figures"]] == [
        ("TTFT", 1), ("TPOT", 1), ("TPOT", 3), ("TTLT", 1),
    ]  # fmt: skip
    for figure in content["figures"]:
        assert f"{figure['time']['median']:.3f}" in out
    assert "kernels of quamba, TPOT eager, batch 3" in out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize("quantized", [True, False])
def test_a_model(tmp_path: Path, quantized: bool) -> None:
    (make("mamba", "quamba") if quantized else make_model("mamba")).save_pretrained(tmp_path / "model")
    code, out, err = run(str(tmp_path / "model"), "--kernels", "0", *FEW)
    assert code == 0, err
    assert f"recipe {'quamba' if quantized else 'quamba-c'}, float32" in out
    assert "kernels of" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ([], 2, "either MODEL or --shape"),
        (["x", "--shape", "tiny"], 2, "either MODEL or --shape"),
        (["--shape", "tiny", "--batch", "1,x"], 2, "found '1,x'; expected positive numbers"),
        (["--shape", "tiny", "--length", "0"], 2, "found '0'; expected positive numbers"),
        (["--shape", "huge"], 1, "found the shape 'huge'; expected one of mamba-130m"),
        (["--shape", "tiny", "--recipe", "x"], 1, "found recipe"),
        (["--shape", "tiny", "--against", "vllm"], 1, "found --against 'vllm'"),
        (["/nowhere"], 1, "found no folder '/nowhere'"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, reason: str) -> None:
    found, out, err = run(*arguments, "--device", "cpu")
    assert found == code
    assert reason in " ".join(err.replace("│", " ").split())
    assert out == ""
