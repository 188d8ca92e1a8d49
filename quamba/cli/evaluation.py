"""What `quamba eval` and `quamba compare` share: options, checks of what they name, cells of tables."""

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from quamba.errors import TaskError
from quamba.eval.results import TaskResult
from quamba.eval.tasks import parse_task
from quamba.eval.template import LocalTask
from quamba.text import TextPart

TextOption = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]FILE[:FIRST:LAST]", help="A text file, or a range of its tokens; repeatable."),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|TEMPLATE.json=DATA[,LABELS]",
        help="A task of lm-eval's, or a template of ours with its local files; repeatable.",
    ),
]
BatchOption = Annotated[
    str, typer.Option(metavar="N|auto", help="Sequences per forward pass; auto: as many as memory holds.")
]


def chosen_batch(value: str) -> int | None:
    """None for "auto"."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise typer.BadParameter(f"found {value!r}; expected a positive number, or 'auto'", param_hint="--batch-size")
    return int(value)


def chosen_texts(values: list[str] | None) -> list[TextPart]:
    """The texts, each with a name of its own and a file that is there."""
    parts = [TextPart.parse(value) for value in values or []]
    for part in parts:
        if not Path(part.path).is_file():
            raise typer.BadParameter(f"found no file {part.path!r}", param_hint="--text")
    _check_names([part.name for part in parts], "--text")
    return parts


def chosen_tasks(values: list[str] | None) -> list[str | LocalTask]:
    """The tasks, each with a name of its own."""
    try:
        tasks = [parse_task(value) for value in values or []]
    except (TaskError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--task") from error
    _check_names([task if isinstance(task, str) else task.template.name for task in tasks], "--task")
    return tasks


def _check_names(names: list[str], option: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise typer.BadParameter(
            f"found the name {twice[0]!r} twice; expected a name of its own for each: NAME=FILE, or in the template",
            param_hint=option,
        )


def process_device(device: str) -> str:
    """With several processes of `accelerate launch`, "cuda" is each one's own GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def is_first_process() -> bool:
    """True for the process that prints: the only one, or the first of `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def metric_cell(name: str, value: float, stderr: float) -> str:
    """A figure with its standard error; accuracies in percent."""
    scale, unit = (100, " %") if name.startswith("acc") else (1, "")
    error = "" if math.isnan(stderr) else f" ± {scale * stderr:.2f}"
    return f"{scale * value:.2f}{error}{unit}" if unit else f"{value:.4f}{error}"


def headline_cell(result: TaskResult) -> str:
    """The figure that stands for a task."""
    metric = result.metrics[result.headline]
    return metric_cell(result.headline, metric.value, metric.stderr)
