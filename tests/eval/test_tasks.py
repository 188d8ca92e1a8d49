"""Tasks through lm-eval, against the definitions computed by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from quamba.errors import TaskError, UnsupportedModelError
from quamba.eval import LocalTask, TaskTemplate, run_tasks
from tests.shipped import save_small_model, text_of

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'quamba[eval]'")

LAST_WORD = TaskTemplate("words", "last_word")
CHOICES = TaskTemplate("choices", "multiple_choice", prompt="Q: {q}\nA:", choices=("a", "b", "c"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), dtype=torch.float32)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    # Not through from_pretrained alone: larger weights, so that predictions differ between contexts.
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """(L, V) in float64: of the token after each."""
    return model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)


def score(model: Any, tokenizer: Any, context: str, target: str) -> tuple[float, bool]:
    """The log-likelihood of a target, and whether it is the likeliest at every token."""
    before, after = ids_of(tokenizer, context), ids_of(tokenizer, target)
    rows = log_probabilities(model, before + after)[len(before) - 1 : -1]
    chosen = torch.tensor(after)
    likelihood = rows.gather(1, chosen[:, None]).sum()
    return float(likelihood), bool((rows.argmax(dim=-1) == chosen).all())


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def continued(model: Any, tokenizer: Any, context: str) -> str:
    """The context with the word that the model expects, where that is one token that begins a word."""
    following = log_probabilities(model, ids_of(tokenizer, context))[-1]
    for token in following.argsort(descending=True).tolist()[:1]:
        word = tokenizer.decode([token])
        if word.startswith(" ") and word[1:].isalpha():
            return context + word
    return context + " nothing"


def test_last_word(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    passages = [text_of(90 + 7 * n, start=400 * n).rpartition(" ")[0] for n in range(12)]
    texts = [continued(model, tokenizer, passage) if n % 2 else passage for n, passage in enumerate(passages)]
    task = LocalTask(LAST_WORD, write(tmp_path / "data", [{"text": text} for text in texts]))
    (found,) = run_tasks(model, tokenizer, [task], batch_size=5)
    scores = [score(model, tokenizer, head, " " + word) for head, _, word in (text.rpartition(" ") for text in texts)]
    right = [float(greedy) for _, greedy in scores]
    assert found.per_document["acc"] == right
    assert found.metrics["acc"].value == pytest.approx(sum(right) / 12)
    share = sum(right) / 12
    assert found.metrics["acc"].stderr == pytest.approx(math.sqrt(share * (1 - share) / 11))
    expected = math.exp(-sum(likelihood for likelihood, _ in scores) / 12)
    assert found.metrics["perplexity"].value == pytest.approx(expected, rel=1e-4)
    assert found.metrics["perplexity"].stderr > 0
    assert (found.documents, found.batch_size, found.headline) == (12, 5, "acc")


def test_multiple_choice(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = []
    for n in range(10):
        words = text_of(300, start=500 * n).split()
        rows.append(
            {"q": " ".join(words[:9]), "a": words[12], "b": " ".join(words[20:24]), "c": words[30], "label": n % 3}
        )
    task = LocalTask(CHOICES, write(tmp_path / "data", rows))
    (found,) = run_tasks(model, tokenizer, [task])
    right, right_by_length = [], []
    for row in rows:
        options = [str(row[name]) for name in "abc"]
        likelihoods = [score(model, tokenizer, f"Q: {row['q']}\nA:", " " + option)[0] for option in options]
        by_length = [value / len(option) for value, option in zip(likelihoods, options, strict=True)]
        right.append(float(max(range(3), key=likelihoods.__getitem__) == row["label"]))
        right_by_length.append(float(max(range(3), key=by_length.__getitem__) == row["label"]))
    assert found.per_document == {"acc": right, "acc_norm": right_by_length}
    assert found.metrics["acc_norm"].value == pytest.approx(sum(right_by_length) / 10)


def test_whole_documents(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_text(text_of(700) + "<|endoftext|>" + text_of(300, start=900), encoding="utf-8")
    template = TaskTemplate("pages", "text", documents="file", separator="<|endoftext|>")
    (found,) = run_tasks(model, tokenizer, [LocalTask(template, tmp_path / "data")], max_length=50)
    likelihood = words = size = 0.0
    for page in (text_of(700), text_of(300, start=900)):
        # Windows of 50 predictions: the first after the end-of-text token; a shorter last one reaches back, its
        # context is what precedes in a window of 51.
        ids = [tokenizer.eos_token_id, *ids_of(tokenizer, page)]
        for begin in range(1, len(ids), 50):
            end = min(begin + 50, len(ids))
            first = max(end - 51, 0)
            rows = log_probabilities(model, ids[first : end - 1])[begin - 1 - first :]
            likelihood += float(rows.gather(1, torch.tensor(ids[begin:end])[:, None]).sum())
        words += len(page.split()) + (page[:1].isspace()) + (page[-1:].isspace())
        size += len(page.encode())
    assert found.metrics["word_perplexity"].value == pytest.approx(math.exp(-likelihood / words), rel=1e-4)
    assert found.metrics["byte_perplexity"].value == pytest.approx(math.exp(-likelihood / size), rel=1e-4)
    assert found.metrics["bits_per_byte"].value == pytest.approx(-likelihood / size / math.log(2), rel=1e-4)
    assert found.headline == "word_perplexity"
    assert found.per_document == {}


def test_wikitext_is_detokenized_but_counted_as_it_was(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    page = ' = Title = \n He said , " Well - known @-@ it is " . \n'
    (tmp_path / "data").write_text(page + page, encoding="utf-8")
    template = TaskTemplate("wiki", "text", documents="wikitext")
    (found,) = run_tasks(model, tokenizer, [LocalTask(template, tmp_path / "data")])
    # lm-eval's rules: numbers' and words' separators joined, space before punctuation and inside quotes dropped.
    plain = ' = Title =\nHe said, "Well - known-it is".\n'
    ids = [tokenizer.eos_token_id, *ids_of(tokenizer, plain)]
    likelihood = float(log_probabilities(model, ids[:-1]).gather(1, torch.tensor(ids[1:])[:, None]).sum())
    assert found.documents == 2
    assert found.metrics["byte_perplexity"].value == pytest.approx(math.exp(-likelihood / len(page)), rel=1e-4)


def test_limit_and_quiet_and_nothing_left_behind(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = LocalTask(LAST_WORD, write(tmp_path / "data", [{"text": text_of(60, start=n)} for n in range(0, 900, 100)]))
    before = dict(os.environ)
    model.train()
    (found,) = run_tasks(model, tokenizer, [task], limit=4)
    assert found.documents == 4
    assert tuple(capsys.readouterr()) == ("", "")
    assert dict(os.environ) == before
    assert model.training
    model.eval()


def test_the_batch_is_halved_where_memory_does_not_suffice(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    task = LocalTask(LAST_WORD, write(tmp_path / "data", [{"text": text_of(60, start=n)} for n in range(0, 900, 100)]))
    (expected,) = run_tasks(model, tokenizer, [task])

    def scarce(module: Any, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.register_forward_pre_hook(scarce)
    try:
        (found,) = run_tasks(model, tokenizer, [task])
        assert (expected.batch_size, found.batch_size) == (8, 2)
        assert found.metrics["perplexity"].value == pytest.approx(expected.metrics["perplexity"].value, rel=1e-4)
        with pytest.raises(torch.OutOfMemoryError):
            run_tasks(model, tokenizer, [task], batch_size=8)
    finally:
        handle.remove()


def test_a_quantized_model_takes_part(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    quantized = quamba.quantize(AutoModelForCausalLM.from_pretrained(folder), None, "dynamic")
    task = LocalTask(LAST_WORD, write(tmp_path / "data", [{"text": text_of(80)}, {"text": text_of(70, start=90)}]))
    (found,) = run_tasks(quantized, tokenizer, [task])
    texts = [text_of(80), text_of(70, start=90)]
    scores = [score(quantized, tokenizer, t.rpartition(" ")[0], " " + t.rpartition(" ")[2])[0] for t in texts]
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(-sum(scores) / 2), rel=1e-3)


def test_what_cannot_be_run_raises(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="found Linear"):
        run_tasks(torch.nn.Linear(1, 1), tokenizer, [])
    for name in [name for name in sys.modules if name == "quamba.eval.harness"]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr("quamba.eval.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskError, match=r"pip install 'quamba\[eval\]'"):
        run_tasks(model, tokenizer, ["piqa"])


@pytest.mark.slow
def test_a_name_that_lm_eval_does_not_know_raises(model: Any, tokenizer: Any) -> None:
    with pytest.raises(TaskError, match="found no task 'absent_task'"):
        run_tasks(model, tokenizer, ["absent_task"])


@pytest.mark.slow
def test_processes_of_accelerate_share_the_documents(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": text_of(60, start=n)} for n in range(0, 700, 100)]
    rows[3]["text"] = continued(AutoModelForCausalLM.from_pretrained(folder), tokenizer, rows[3]["text"])
    words = LocalTask(LAST_WORD, write(tmp_path / "words", rows))
    pages = LocalTask(TaskTemplate("pages", "text"), words.data)
    arguments = ["eval", str(folder), "--json", "--batch-size", "3"]
    for task in (words, pages):
        template = tmp_path / f"{task.template.name}.json"
        template.write_text(json.dumps(task.template.to_dict()))
        arguments += ["--task", f"{template}={task.data}"]
    program = tmp_path / "quamba"
    program.write_text("from quamba.cli import main\nmain()\n")
    # On a CPU the processes talk through gloo; `--cpu` alone would want MPI, and start one process without it.
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options.split(), str(program), *arguments],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    # One process prints, on one line.
    together = json.loads(done.stdout)["tasks"]
    alone = run_tasks(AutoModelForCausalLM.from_pretrained(folder), tokenizer, [words, pages], batch_size=3)
    assert [task["name"] for task in together] == ["words", "pages"]
    for found, result in zip(together, alone, strict=True):
        assert found["documents"] == result.documents == 7
        assert set(found["metrics"]) == set(result.metrics)
        for name, metric in found["metrics"].items():
            value, stderr = metric["value"], math.nan if metric["stderr"] is None else metric["stderr"]
            assert value == pytest.approx(result.metrics[name].value, rel=1e-5)
            # A bootstrap over the same documents in the same order.
            assert stderr == pytest.approx(result.metrics[name].stderr, rel=1e-5, nan_ok=True)
