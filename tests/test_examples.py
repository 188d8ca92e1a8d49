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
from quamba.eval import Metric, TaskResult, parse_task, perplexity
from quamba.eval.trials import Trial
from quamba.text import read_ids, windows
from tests.shipped import EXAMPLES, save_small_model, text_of

BENCHMARKS = EXAMPLES.parent / "benchmarks"
MODEL = EXAMPLES / "mamba-books"
TEXTS = EXAMPLES / "texts"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quickstart() -> ModuleType:
    return script(EXAMPLES / "quickstart.py")


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


def test_calibrate_on_your_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_small_model(tmp_path / "model")
    (tmp_path / "mine.txt").write_text(text_of(3000), encoding="utf-8")
    module = script(EXAMPLES / "calibrate_on_your_data.py")
    module.main(
        model=model, text=tmp_path / "mine.txt", share=0.25, samples=4, length=32, limit=6, out=tmp_path / "out"
    )
    printed = capsys.readouterr().out
    for expected in ("shipped", "yours", "rest of yours", "float", "%"):
        assert expected in printed
    tokens = read_ids(AutoTokenizer.from_pretrained(model), tmp_path / "mine.txt")
    cut = len(tokens) // 4
    assert f"{cut} tokens to calibrate on, {len(tokens) - cut} to judge by" in printed
    expected = AutoModelForCausalLM.from_pretrained(model)
    quamba.quantize(expected, list(windows(tokens[:cut], length=32, count=4)))
    sample = tokens[None, :50]
    with torch.no_grad():
        assert torch.equal(quamba.load(tmp_path / "out")(sample).logits, expected(sample).logits)


def scored(name: str, **accuracies: float) -> Trial:
    tasks = {
        task: TaskResult(task, "1.0", 5, {"acc": Metric(value, 0.1), "acc_norm": Metric(value / 2, 0.1)}, {}, 8)
        for task, value in accuracies.items()
    }
    return Trial({"name": name}, None, bytes=1, seconds=0.0, tasks=tasks)


def test_the_paper_s_table_holds_measured_figures_alone() -> None:
    module = script(EXAMPLES / "reproduce_paper.py")
    six = {
        "lambada_openai": 0.6,
        "hellaswag": 0.8,
        "piqa": 0.7,
        "arc_easy": 0.5,
        "arc_challenge": 0.6,
        "winogrande": 0.4,
    }
    whole, part = scored("quamba", **six), scored("quamba", **{k: v for k, v in six.items() if k != "winogrande"})
    # HellaSwag and ARC-challenge count by length, as in the paper.
    measured = ["60.0", "40.0", "70.0", "50.0", "30.0", "40.0"]
    assert module.rows_of("2.8b", [whole], limited=False) == [["2.8b", "quamba", "62.2", "48.3", *measured]]
    assert module.rows_of("2.8b", [whole], limited=True)[0][3] == "—"
    assert module.rows_of("2.8b", [part], limited=False)[0][3:] == ["—", *measured[:-1], "—"]
    nothing = module.rows_of("130m", [scored("naive"), scored("dynamic")], limited=False)
    assert nothing == [["130m", name, *["—"] * 8] for name in ("naive", "dynamic")]
    assert set(module.PAPER) <= set(quamba.RECIPES)


def test_reproduce_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'quamba[eval]'")
    model = save_small_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text_of(70, start=n)}) + "\n" for n in range(5)))
    arguments = [
        "--model", f"130m={model}", "--task", f"{EXAMPLES}/tasks/lambada.json={tmp_path}/rows.jsonl",
        "--recipes", "quamba", "--calib", str(EXAMPLES / "texts" / "calibration.txt"), "--samples", "2",
        "--length", "16", "--device", "cpu", "--dtype", "float32", "--state", str(tmp_path / "state"),
    ]  # fmt: skip
    script(EXAMPLES / "reproduce_paper.py").main(arguments)
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "130m" in line]
    assert [row[:4] for row in rows] == [["130m", "float", "44.7", "—"], ["130m", "quamba", "43.5", "—"]]
    kept = json.loads((tmp_path / "state" / "paper-130m.json").read_text())["trials"]
    for row, trial in zip(rows, kept, strict=True):
        assert row[4:] == [f"{100 * trial['tasks']['lambada']['metrics']['acc']['value']:.1f}", *["—"] * 5]


def test_the_paper_s_latencies_hold_measured_times_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_small_model(tmp_path / "model")
    module = script(EXAMPLES / "reproduce_paper.py")
    arguments = [
        "--recipes", "quamba,quamba-w4a4", "--tables", "latency", "--prompts", "8,12", "--output", "3",
        "--device", "cpu", "--dtype", "float32", "--seconds",
    ]  # fmt: skip
    module.main([*arguments, "1", "--model", f"2.8b={model}"])
    measured = table_of(capsys.readouterr().out)
    module.main([*arguments, "0.001", "--model", f"130m={model}"])
    hasty = table_of(capsys.readouterr().out)
    titles = ["paper: generation, Orin Nano 8G", "TTFT, prompt 8", "TTFT, prompt 12", "TPOT, batch 1"]
    titles += ["TTLT, prompt 8, 3 new", "TTLT, prompt 12, 3 new"]
    titles += ["checkpoint, MB", "weights in memory, MB", "state of a sequence, MB"]
    # No simulation has a time. The paper's ratio is of its largest model.
    assert [row[0] for row in measured] == titles
    assert {len(row) for row in measured} == {3}
    assert [measured[0][1:], hasty[0][1:]] == [["—", "1.72x"], ["—", "—"]]
    assert all("[" in row[2] and row[2].endswith("x") for row in measured[1:6])
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert float(measured[6][1]) == pytest.approx(size / 1e6, abs=0.01)
    # What could only be computed in the time is not there.
    assert [row[0] for row in hasty] == [title for title in titles if "TTLT" not in title]


def table_of(printed: str) -> list[list[str]]:
    """The rows of rich's tables, without their headings."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def test_last_word_passages() -> None:
    module = script(BENCHMARKS / "last_word.py")
    filler = "One two three four. "
    text = "Skip me. " + filler * 3 + "Then Anna spoke, and Anna, she said no more. It is it. " + filler * 5
    found = list(module.passages(text, words=15, most=30))
    # The first word from the fifteenth on that a mark follows and that occurs before.
    assert found[0] == text.partition(", she")[0]
    # The rest of that sentence begins no passage; the next one does.
    assert found[1].startswith("It is it. One two")
    assert found[1].endswith(" four")
    assert len(found[1].split()) == 15
    # "it" is too short, "no" does not occur before, and nothing spans the end of a document.
    assert list(module.passages(filler * 2 + module.END_OF_TEXT + filler * 2, words=9, most=30)) == []
    assert list(module.passages("Alpha beta gamma delta. Zeta eta theta.", words=3, most=30)) == []
    # Too long from the first sentence on, but not from the second.
    long = "w " * 40 + "end. " + filler * 3
    assert [p.split()[0] for p in module.passages(long, words=6, most=20)] == ["One"]


def test_last_word_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = script(BENCHMARKS / "last_word.py")
    for name in ("a", "b"):
        monkeypatch.setattr("sys.argv", ["last_word.py", str(TEXTS / "evaluation.txt"), str(tmp_path / name)])
        module.main()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    task = parse_task(f"{EXAMPLES}/tasks/last_word.json={tmp_path}/a")
    questions = task.questions()
    assert f"{len(questions)} passages" in capsys.readouterr().out
    assert len(questions) > 20
    for question in questions:
        assert question["target"].strip() in question["context"]
        assert 49 <= len(question["context"].split()) < 100
