"""Tasks through lm-eval: its own by name, where the hub can be reached, and ours over local files.

Needs the extra "eval" (lm-eval and accelerate); `quamba.eval.tasks` imports it when it is asked to run one.
"""

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
from accelerate import Accelerator
from lm_eval.api.metrics import stderr_for_metric
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.wikitext import preprocess_wikitext
from transformers import PreTrainedModel

from quamba.errors import TaskError, UnsupportedModelError
from quamba.eval.fitting import starting_batch, with_fitting_batch
from quamba.eval.results import Metric, TaskResult
from quamba.eval.tasks import SEEDS
from quamba.eval.template import LocalTask

_BOOTSTRAP = 1000
# Keeps lm-eval from starting a process on every core to find a standard error.
_IN_PROCESS = "DISABLE_MULTIPROC"
_ACCURACY = {"aggregation": "mean", "higher_is_better": True}
_ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | LocalTask],
    *,
    batch_size: int | None,
    limit: int | None,
    max_length: int,
    progress: bool | None,
) -> list[TaskResult]:
    """`quamba.eval.tasks.run_tasks`."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"found {type(model).__name__}; expected a model of transformers for lm-eval's tasks"
        )
    results = []
    with _surroundings(model, progress=progress):
        for task in tasks:
            for name, loaded in _load(task).items():

                def ask(size: int | str, name: str = name, loaded: Any = loaded) -> Any:
                    lm = _LanguageModel(model, tokenizer, batch_size=size, max_length=max_length)
                    return lm_eval.evaluate(
                        lm, {"tasks": {name: loaded}}, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=True
                    ), lm

                if batch_size is not None:
                    (found, _), size = ask(batch_size), batch_size
                elif Accelerator().num_processes > 1:
                    # lm-eval's search, which agrees on a size with the other processes.
                    found, lm = ask("auto")
                    size = lm.found_batch
                else:
                    (found, _), size = with_fitting_batch(ask, start=starting_batch(model.device))
                if found is not None:
                    _in_order(name, found, loaded.aggregation())
                    results.append(_result(name, found, batch_size=size))
    return results


class _LanguageModel(HFLM):
    """lm-eval's model around ours, loaded already; one process of several, where accelerate started them."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int | str, max_length: int) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length,
            max_batch_size=starting_batch(model.device), softmax_dtype="float32",
        )  # fmt: skip
        # The least that "auto" came to.
        self.found_batch = starting_batch(model.device)
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _detect_batch_size(self, *arguments: Any, **options: Any) -> int:
        found = int(super()._detect_batch_size(*arguments, **options))
        self.found_batch = min(self.found_batch, found)
        return found


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to make."""
    return TaskManager()


def _load(task: str | LocalTask) -> dict[str, Any]:
    """lm-eval's task objects, by name; a tag or group gives several."""
    if isinstance(task, LocalTask):
        found = TaskManager(include_defaults=False).load([_definition(task)])["tasks"]
    else:
        manager = _manager()
        if task not in manager.all_tasks:
            raise TaskError(
                f"found no task {task!r} in lm-eval {lm_eval.__version__}; expected one of its names, such as "
                "lambada_openai, hellaswag, piqa, arc_easy, arc_challenge, winogrande, or TEMPLATE.json=DATA"
            )
        try:
            found = manager.load([task])["tasks"]
        # Whatever the way to the hub raises: no network, no such dataset, a broken file.
        except Exception as error:
            raise TaskError(
                f"found no data for lm-eval's task {task!r} ({type(error).__name__}: {str(error)[:200]}); expected to "
                "reach the hub, or a local file through a template: TEMPLATE.json=DATA"
            ) from error
    for loaded in found.values():
        if loaded.get_config("num_fewshot") is None:
            loaded.set_config(key="num_fewshot", value=0)
        loaded.set_fewshot_seed(seed=SEEDS["fewshot"])
    return dict(found)


def _definition(task: LocalTask) -> dict[str, Any]:
    """A local task as lm-eval defines tasks; prompts, targets and metrics as in its own lambada_openai, piqa and
    wikitext."""
    questions = task.questions()
    common = {
        "task": task.template.name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(questions)},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    if task.template.kind == "last_word":
        return common | {
            "output_type": "loglikelihood",
            "doc_to_text": lambda question: question["context"],
            "doc_to_target": lambda question: question["target"],
            "target_delimiter": "",
            "metric_list": [
                {"metric": "acc", **_ACCURACY},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
    if task.template.kind == "multiple_choice":
        return common | {
            "output_type": "multiple_choice",
            "doc_to_text": lambda question: question["prompt"],
            "doc_to_target": lambda question: question["gold"],
            "doc_to_choice": lambda question: question["choices"],
            "metric_list": [{"metric": "acc", **_ACCURACY}, {"metric": "acc_norm", **_ACCURACY}],
        }
    rolling = common | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": lambda question: question["page"],
        "metric_list": [{"metric": metric} for metric in _ROLLING],
    }
    if task.template.documents == "wikitext":
        rolling |= {
            "doc_to_target": preprocess_wikitext.wikitext_detokenizer,
            "process_results": preprocess_wikitext.process_results,
        }
    return rolling


def _in_order(name: str, found: Any, aggregations: Mapping[str, Callable[[Sequence[Any]], float]]) -> None:
    """Sort the documents, and, where several processes had a share of them, aggregate them again in that order.

    A bootstrap depends on the order; a task whose filters score a document several times is left as it is.
    """
    samples = found["samples"][name]
    samples.sort(key=lambda sample: sample["doc_id"])
    row = found["results"][name]
    if Accelerator().num_processes == 1 or len({sample["doc_id"] for sample in samples}) < len(samples):
        return
    for key in row:
        metric, comma, which = key.partition(",")
        if comma and metric in aggregations and all(metric in sample for sample in samples):
            values = [sample[metric] for sample in samples]
            row[key] = aggregations[metric](values)
            error = stderr_for_metric(aggregations[metric], _BOOTSTRAP)
            if error is not None:
                row[f"{metric}_stderr,{which}"] = error(values)


def _result(name: str, found: Any, *, batch_size: int) -> TaskResult:
    row, samples = found["results"][name], found["samples"][name]
    metrics, documents = {}, {}
    for key, value in row.items():
        metric, comma, which = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = row.get(f"{metric}_stderr,{which}")
        metrics[metric] = Metric(float(value), float(error) if isinstance(error, int | float) else float("nan"))
        values = [sample[metric] for sample in samples if metric in sample]
        if metric.startswith("acc") and all(isinstance(each, int | float) for each in values):
            documents[metric] = [float(each) for each in values]
    return TaskResult(
        name=name,
        version=str(found["versions"][name]),
        documents=len(samples),
        metrics=metrics,
        per_document=documents,
        batch_size=batch_size,
    )


@contextmanager
def _surroundings(model: Any, *, progress: bool | None) -> Iterator[None]:
    """Seeds set; lm-eval quiet, its messages on stderr, its bootstrap in this process; all as it was afterwards."""
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    shown = sys.stderr.isatty() if progress is None else progress
    before = os.environ.get(_IN_PROCESS)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "accelerate")]
    levels = [logger.level for logger in loggers]
    training = model.training
    os.environ[_IN_PROCESS] = "1"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    console: Any = sys.stderr if shown else _Nowhere()
    try:
        with redirect_stdout(console), redirect_stderr(console):
            yield
    finally:
        model.train(training)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ[_IN_PROCESS]
        else:
            os.environ[_IN_PROCESS] = before


class _Nowhere:
    """A stream for progress bars that nobody watches, and what lm-eval prints beside them."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
