"""Latencies on a GPU: through graphs and eagerly, the float model's too, and in a comparison without being asked."""

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from quamba.cli import app
from tests.shipped import save_small_model, text_of


def run(*arguments: object) -> str:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    return found.stdout


def test_a_profile(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    run(
        "bench", "--shape", "tiny", "--recipes", "float,quamba-c,dynamic", "--length", "16,40", "--output", "4",
        "--batch", "1,16", "--rounds", 1, "--runs", 3, "--json", file,
    )  # fmt: skip
    found = json.loads(file.read_text())
    assert found["modes"] == dict.fromkeys(("float", "quamba-c", "dynamic"), "graph")
    assert found["device"] == torch.cuda.get_device_name()
    # Two prompts and two batches in two modes, and two prompts with new tokens, three models each.
    assert len(found["figures"]) == 3 * (2 * 2 + 2 * 2 + 2)
    assert not found["disturbed"]
    for figure in found["figures"]:
        assert figure["measured"]
        assert figure["time"]["median"] > 0
        assert figure["peak_bytes"] >= 0


def test_a_comparison(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text_of(3000), encoding="utf-8")
    out = run(
        "compare", model, "--recipes", "dynamic,quamba-w4a4", "--text", tmp_path / "text.txt", "--limit", 2,
        "--calib", tmp_path / "text.txt", "--samples", 2, "--seq-len", 64, "--context", 40, "--device", "cuda",
        "--dtype", "float16", "--state", tmp_path / "state.json", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert found["timed_on"]["hardware"] == torch.cuda.get_device_name()
    base, dynamic, simulated = (line["latency"] for line in found["lines"])
    assert simulated is None
    assert {base["mode"], dynamic["mode"]} == {"graph"}
    assert dynamic["times"]["TPOT"]["runs"] == 60
