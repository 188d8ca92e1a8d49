"""quamba bench: what it prints and writes."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quamba.bench.profile import milliseconds
from quamba.cli import app
from tests.runtime.helpers import make
from tests.tiny import make_model

FEW = ["--device", "cpu", "--rounds", "1", "--runs", "2", "--new-tokens", "2", "--length", "4"]


def run(*arguments: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["bench", *arguments])
    return found.exit_code, found.stdout, found.stderr


def test_a_shape(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, err = run("--shape", "tiny", "--batch", "1,3", "--recipes", "naive", "--json", str(file), *FEW)
    assert code == 0, err
    content = json.loads(file.read_text())
    assert (content["model"], content["modes"], content["dtype"]) == ("tiny", {"naive": "eager"}, "float32")
    assert content["reference"] is None
    assert [(f["case"]["what"], f["case"]["batch"]) for f in content["figures"]] == [
        ("TTFT", 1), ("TPOT", 1), ("TPOT", 3), ("TTLT", 1),
    ]  # fmt: skip
    for figure in content["figures"]:
        assert milliseconds(figure["time"]["median"]) in out
    assert "kernels of naive, TPOT eager, batch 3" in out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize("quantized", [True, False])
def test_a_model(tmp_path: Path, quantized: bool) -> None:
    (make("mamba", "quamba") if quantized else make_model("mamba")).save_pretrained(tmp_path / "model")
    code, out, err = run(str(tmp_path / "model"), "--kernels", "0", *FEW)
    assert code == 0, err
    assert f"│ TTFT │ eager │ {'quamba' if quantized else 'quamba-c'} " in out
    assert "kernels of" not in out
    if quantized:
        code, out, err = run(str(tmp_path / "model"), "--recipes", "naive", *FEW)
        assert (code, out) == (1, "")
        assert "which is quantized; expected the float model" in err


def test_recipes_and_lengths(tmp_path: Path) -> None:
    make_model("mamba", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    file = tmp_path / "found.json"
    few = ["--device", "cpu", "--rounds", "1", "--runs", "2", "--batch", "3"]
    code, out, err = run(
        str(tmp_path / "model"), "--recipes", "float,naive", "--length", "4,6", "--output", "2,5", "--markdown",
        "--json", str(file), *few,
    )  # fmt: skip
    assert code == 0, err
    content = json.loads(file.read_text())
    assert content["reference"] == "float"
    figures = content["figures"]
    assert all(figure["measured"] for figure in figures)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "float", "naive"]
    # The step of one sequence, which a computed TTLT would need, is there unasked.
    assert [row[0] for row in rows[2:]] == [
        "TTFT, prompt 4", "TTFT, prompt 6", "TPOT, batch 1", "TPOT, batch 3", "TTLT, prompt 4, 2 new",
        "TTLT, prompt 4, 5 new", "TTLT, prompt 6, 2 new", "TTLT, prompt 6, 5 new",
        "checkpoint, MB", "weights in memory, MB", "state of a sequence, MB",
    ]  # fmt: skip
    for number, row in enumerate(rows[2:10]):
        base, found = (figure["time"] for figure in figures[2 * number : 2 * number + 2])
        assert row[1].startswith(f"{base['median']:.3f} [") or base["median"] >= 10
        assert row[2].endswith(f"], {base['median'] / found['median']:.2f}x")
    # Tied: one table for embedding and head.
    state = make_model("mamba", dtype=torch.bfloat16).state_dict()
    stored = sum(tensor.nbytes for name, tensor in state.items() if name != "lm_head.weight")
    assert content["memory"]["float"]["checkpoint"] == stored
    assert content["memory"]["naive"]["checkpoint"] < 0.75 * stored


def test_a_time_too_long_is_computed(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, err = run("--shape", "tiny", "--seconds", "0.001", "--json", str(file), *FEW, "--output", "90")
    assert code == 0, err
    first, step, whole = json.loads(file.read_text())["figures"]
    assert whole["time"]["median"] == pytest.approx(first["time"]["median"] + 89 * step["time"]["median"])
    assert whole["time"]["upper"] == pytest.approx(first["time"]["upper"] + 89 * step["time"]["upper"])
    assert (whole["measured"], whole["time"]["runs"], first["measured"]) == (False, 0, True)
    assert "~" in out
    assert "computed, TTFT + (new tokens - 1) TPOT, not measured" in out


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ([], 2, "either MODEL or --shape"),
        (["x", "--shape", "tiny"], 2, "either MODEL or --shape"),
        (["--shape", "tiny", "--batch", "1,x"], 2, "found '1,x'; expected positive numbers"),
        (["--shape", "tiny", "--length", "0"], 2, "found '0'; expected positive numbers"),
        (["--shape", "huge"], 1, "found the shape 'huge'; expected one of mamba-130m"),
        (["--shape", "tiny", "--recipes", "x"], 2, "found recipe"),
        (["--shape", "tiny", "--recipes", "naive,naive"], 1, "expected a name of its own"),
        (["--shape", "tiny", "--recipes", "quamba-w4a4"], 1, "simulates its bits in float"),
        (["--shape", "tiny", "--output", "8,0"], 2, "found '8,0'; expected positive numbers"),
        (["--shape", "tiny", "--against", "vllm"], 1, "found --against 'vllm'"),
        (["/nowhere"], 1, "found no folder '/nowhere'"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, reason: str) -> None:
    found, out, err = run(*arguments, "--device", "cpu")
    assert found == code
    assert reason in " ".join(err.replace("│", " ").split())
    assert out == ""
