"""quamba compare, as a person runs it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import quamba
from quamba.cli import app
from quamba.eval import perplexity
from quamba.eval.provenance import model_sha256
from quamba.text import read_ids
from quamba.text import windows as calibration_windows


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def one_line(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_it_goes_on_where_it_stopped(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--calib", f"{text}:0:200", "--text", f"books={text}:200:", "--samples", 3, "--seq-len", 32)
    sizes = ("--context", 40, "--limit", 5, "--keep", "layers.0.dt")
    first = run(model, "--recipes", "naive,dynamic", *options, *sizes, "--markdown")
    assert first.exit_code == 0, first.stderr
    assert [line.split("|")[1].strip() for line in first.stdout.splitlines()] == [
        "recipe",
        "---",
        "float",
        "naive",
        "dynamic",
    ]
    assert first.stderr.count("done") == 3
    state = tmp_path / f"quamba-compare-{model.name}.json"
    assert state.is_file()

    again = run(model, "--recipes", "naive,quamba-c", *options, *sizes, "--json")
    assert again.stderr.count("done") == 1
    found = one_line(again)
    assert [line["recipe"] for line in found["lines"]] == ["float", "naive", "quamba-c"]
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert found["model_sha256"] == model_sha256(original)
    ids = read_ids(AutoTokenizer.from_pretrained(model), text)
    data = calibration_windows(ids[:200], length=32, count=3)
    quamba.quantize(original, list(data), "quamba-c", keep=["layers.0.dt"])
    expected = perplexity(original, ids[200:400], context=40)
    assert found["lines"][2]["texts"]["books"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)

    changed = run(model, "--recipes", "naive", *options, "--context", 32)
    assert (changed.exit_code, changed.stdout) == (1, "")
    assert "a comparison with other context, keep, limit" in changed.stderr
    anew = run(model, "--recipes", "dynamic", *options, "--context", 32, "--restart")
    assert "dynamic" in anew.stdout
    assert len(json.loads(state.read_text())["trials"]) == 2


def test_a_picture(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    options = (model, "--text", f"books={text}", "--limit", 2, "--context", 40, "--recipes", "dynamic")
    picture, state = tmp_path / "new" / "trade.png", tmp_path / "state.json"
    done = run(*options, "--state", state, "--picture", picture, "--markdown")
    assert done.stdout.startswith("| recipe |")
    assert f"{picture}: written" in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["trade.png"]
    wrong = run(*options, "--state", state, "--picture", tmp_path / "trade.jpg")
    assert (wrong.exit_code, wrong.stdout) == (2, "")


def test_recipes_are_timed_on_one_machine(model: Path, text: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    options = (model, "--text", f"books={text}", "--limit", 2, "--context", 40, "--state", state)
    timed = (*options, "--latency", "--latency-prompt", 9, "--latency-batch", 2)
    first = one_line(run(*timed, "--recipes", "dynamic", "--json"))
    assert first["latency"]["prompt"] == 9
    assert first["timed_on"]["hardware"] == first["hardware"]
    for line in first["lines"]:
        assert (line["latency"]["prompt"], line["latency"]["batch"]) == (9, 2)
        assert line["latency"]["times"]["TPOT"]["runs"] >= 3
    # Resumed, with the times of then.
    again = run(*timed, "--recipes", "dynamic", "--markdown")
    assert "done" not in again.stderr
    head, _, base, row, _, note, *_ = again.stdout.splitlines()
    assert head.endswith("| TTFT (2 x 9 tokens), ms | TPOT (batch 2), ms |")
    tpot = [line["latency"]["times"]["TPOT"]["median"] for line in first["lines"]]
    assert f"| {tpot[0]:.3f}" in base
    assert f"| {tpot[1]:.3f}" in row
    assert f"({tpot[0] / tpot[1]:.2f}x) |" in row
    assert note.startswith("TTFT, TPOT: medians of")
    assert "in brackets times as fast as float" in note
    other = run(*timed[:-1], 3, "--recipes", "dynamic")
    assert (other.exit_code, other.stdout) == (1, "")
    assert "a comparison with other latency in" in other.stderr
    untimed = run(*options, "--no-latency", "--recipes", "dynamic")
    assert "a comparison with other latency, timed_on in" in untimed.stderr
    with quamba.ops.native.disabled():
        elsewhere = run(*timed, "--recipes", "dynamic")
    assert "a comparison with other timed_on in" in elsewhere.stderr
