"""Zero-shot tasks: how they are named, and how they are run, by lm-eval where it is installed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quamba.errors import TaskError
from quamba.eval.results import TaskResult
from quamba.eval.template import LocalTask, TaskTemplate

# lm-eval's own, for Python and NumPy, torch, and the few-shot examples.
SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
# The length at which lm-eval scores Mamba; models that allow more would read a whole book at once.
MAX_LENGTH = 2048


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | LocalTask],
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    max_length: int = MAX_LENGTH,
    progress: bool | None = None,
) -> list[TaskResult]:
    """Ask a model the questions of some tasks, zero-shot unless a task of lm-eval's brings examples.

    In processes that `accelerate launch` started, each with its copy of the model on its own device, the documents
    are divided between them; the first process gets the results, the others none.

    Args:
        model: a causal language model of transformers, float or quantized.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks, or tasks over local files.
        batch_size: questions at once; None finds what memory holds.
        limit: only the first so many documents of each task.
        max_length: tokens of the longest input; longer ones lose their beginning, whole documents are cut in windows.
        progress: show lm-eval's progress bars; None shows them on a terminal.

    Raises:
        UnsupportedModelError: the model is not one of transformers.
        TaskError: lm-eval is not installed, knows no such task or cannot reach its data; or a local task is malformed.
    """
    try:
        from quamba.eval import harness
    except ImportError as error:
        raise TaskError(f"found no lm-eval ({error}), which runs the tasks; pip install 'quamba[eval]'") from error
    return harness.run(
        model, tokenizer, tasks, batch_size=batch_size, limit=limit, max_length=max_length, progress=progress
    )


def parse_task(argument: str) -> str | LocalTask:
    """A task as it is named in a shell: "TEMPLATE.json", "TEMPLATE.json=DATA", "TEMPLATE.json=DATA,LABELS", or a name
    of lm-eval's, which is returned as it is.

    Raises:
        TaskError: the template is malformed, or no data is named for it.
        OSError: a file is missing.
    """
    path, _, files = argument.partition("=")
    if not path.endswith(".json"):
        return argument
    try:
        template = TaskTemplate.from_dict(json.loads(Path(path).read_text(encoding="utf-8")), where=path)
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: found {error}; expected UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise TaskError(f"{path}: found what is not JSON ({error}); expected a task template") from error
    data, _, labels = files.partition(",")
    near = Path(path).parent
    if not data and template.data is None:
        raise TaskError(f"found no data for task {template.name!r}; expected {path}=DATA")
    if data:
        task = LocalTask(template, Path(data), Path(labels) if labels else None)
    else:
        own = None if template.labels is None else near / template.labels
        task = LocalTask(template, near / str(template.data), own)
    for file in task.files():
        if not file.is_file():
            raise TaskError(f"found no file {str(file)!r}; expected the data of task {template.name!r}")
    return task
