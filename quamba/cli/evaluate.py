"""quamba eval: the perplexity of a float or quantized model on texts, and what it scores in tasks."""

from typing import Annotated

import typer
from rich.table import Table

from quamba.cli.common import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    load_model,
    load_tokenizer,
    output,
    print_json,
    reporting,
)
from quamba.cli.evaluation import (
    BatchOption,
    TaskOption,
    TextOption,
    chosen_batch,
    chosen_tasks,
    chosen_texts,
    is_first_process,
    metric_cell,
    process_device,
)
from quamba.eval import measure_text, provenance, run_tasks
from quamba.eval.results import TaskResult, TextResult
from quamba.eval.tasks import SEEDS
from quamba.nn.named import device_of


def evaluate(
    model: ModelArgument,
    text: TextOption = None,
    task: TaskOption = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window of a text.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="From one window to the next; by default the context: no overlap.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many windows of a text and documents of a task.")
    ] = None,
    batch_size: BatchOption = "auto",
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the perplexity of MODEL on texts, and its scores in tasks."""
    if stride is not None and stride > context:
        raise typer.BadParameter(f"found {stride}; expected at most the context, {context}", param_hint="--stride")
    texts, tasks, batch = chosen_texts(text), chosen_tasks(task), chosen_batch(batch_size)
    if not texts and not tasks:
        raise typer.BadParameter("found neither a text nor a task; expected at least one", param_hint="--text/--task")
    with reporting(debug=debug):
        loaded = load_model(model, dtype=dtype, device=process_device(device))
        tokenizer = load_tokenizer(model)
        measured = [
            measure_text(loaded, tokenizer, part, context=context, stride=stride, batch_size=batch, limit=limit)
            for part in texts
        ]
        scored = run_tasks(loaded, tokenizer, tasks, batch_size=batch, limit=limit) if tasks else []
        if not is_first_process():
            return
        quantization = getattr(loaded, "quantization", None)
        about = {
            "model": model,
            "recipe": None if quantization is None else quantization.recipe.name,
            "model_sha256": provenance.model_sha256(loaded),
            "date": provenance.now(),
            "hardware": provenance.hardware(device_of(loaded)),
            "versions": provenance.versions(),
            "seeds": SEEDS,
        }
        if json:
            texts_json = [result.to_dict() for result in measured]
            print_json({**about, "texts": texts_json, "tasks": [result.to_dict() for result in scored]})
            return
        console = output()
        for table in _tables(model, measured, scored):
            console.print(table)
        console.print(f"{about['date']}, {about['hardware']}, model {str(about['model_sha256'])[:16]}")


def _tables(model: str, texts: list[TextResult], tasks: list[TaskResult]) -> list[Table]:
    tables = []
    if texts:
        table = Table(title=f"{model}: perplexity per token", title_justify="left")
        table.add_column("text")
        for column in ("perplexity", "nll", "tokens", "windows", "tokens/s"):
            table.add_column(column, justify="right")
        for result in texts:
            found = result.perplexity
            table.add_row(
                result.name,
                metric_cell("perplexity", found.perplexity, found.perplexity * found.nll_stderr),
                f"{found.nll:.4f}",
                str(found.tokens),
                f"{len(found.window_tokens)} of {result.context}",
                f"{found.tokens / result.seconds:.0f}",
            )
        tables.append(table)
    if tasks:
        table = Table(title=f"{model}: tasks", title_justify="left")
        for column in ("task", "metric"):
            table.add_column(column)
        table.add_column("score", justify="right")
        table.add_column("documents", justify="right")
        for scored in tasks:
            for name, metric in scored.metrics.items():
                table.add_row(scored.name, name, metric_cell(name, metric.value, metric.stderr), str(scored.documents))
        tables.append(table)
    return tables
