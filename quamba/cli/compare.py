"""quamba compare: what recipes cost on a model, beside the float model, in one table."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from quamba.analysis.figures import FORMATS, image, trades
from quamba.analysis.figures.canvas import matplotlib
from quamba.cli.common import (
    DebugOption,
    DeviceOption,
    Dtype,
    JsonOption,
    chosen_percentile,
    chosen_recipe,
    load_model,
    load_tokenizer,
    message,
    output,
    print_json,
    reporting,
    write_file,
)
from quamba.cli.evaluation import (
    BatchOption,
    TaskOption,
    TextOption,
    chosen_batch,
    chosen_tasks,
    chosen_texts,
)
from quamba.errors import QuambaError
from quamba.eval import provenance
from quamba.eval.comparing import run_trials
from quamba.eval.latency import LatencySettings, timed_on
from quamba.eval.state import StateFile
from quamba.eval.statistics import CONFIDENCE, RESAMPLES
from quamba.eval.table import cells, lines_of, markdown, notes
from quamba.eval.tasks import SEEDS
from quamba.eval.trials import Plan, Trial
from quamba.recipes import RECIPES
from quamba.text import TextPart

# Results of other versions of these are not of the same comparison.
_VERSIONS = ("quamba", "torch", "transformers", "lm_eval")


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model: a local folder or a hub name.")],
    recipes: Annotated[
        str, typer.Option(metavar="A,B,...", help="Recipes, or JSON files with a recipe each; by default all of ours.")
    ] = ",".join(RECIPES),
    calib: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE[:FIRST:LAST]",
            help="A text file, or a range of its tokens, or what `quamba quantize` takes; repeatable: "
            "each recipe is then calibrated on each.",
        ),
    ] = None,
    text: TextOption = None,
    task: TaskOption = None,
    samples: Annotated[int, typer.Option(min=1, help="At most so many calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens per calibration sequence.")] = 512,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window of a text.")] = 512,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many windows of a text and documents of a task.")
    ] = None,
    percentile: Annotated[
        str | None, typer.Option(metavar="F|search", help="Where x is clipped, for every recipe.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="What to keep in float, in every recipe; repeatable.")
    ] = None,
    batch_size: BatchOption = "auto",
    latency: Annotated[
        bool | None,
        typer.Option(
            "--latency/--no-latency", help="Time the first token (TTFT) and the next ones (TPOT). By default on a GPU."
        ),
    ] = None,
    latency_prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that TTFT is of.")] = 512,
    latency_batch: Annotated[int, typer.Option(min=1, help="Sequences timed at once.")] = 1,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where results are kept as they come; a second run goes on from there. By default "
            "quamba-compare-MODEL.json in the working directory.",
        ),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start anew, whatever the state file holds.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Dtype to compute in what is float.")] = Dtype.float32,
    device: DeviceOption = "cpu",
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png|.svg", help="Also draw what is lost against size and latency. Needs the extra 'analysis'."
        ),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Quantize MODEL with each recipe, and print what that costs in accuracy and saves in size."""
    wanted = [chosen_recipe(name) for name in recipes.split(",")]
    level, batch = chosen_percentile(percentile), chosen_batch(batch_size)
    texts, tasks = chosen_texts(text), chosen_tasks(task)
    timed = torch.device(device).type == "cuda" if latency is None else latency
    if json and as_markdown:
        raise typer.BadParameter("found both --json and --markdown; expected one", param_hint="--json")
    if not texts and not tasks:
        raise typer.BadParameter("found neither a text nor a task; expected at least one", param_hint="--text/--task")
    if picture is not None and picture.suffix[1:] not in FORMATS:
        raise typer.BadParameter(f"found {str(picture)!r}; expected FILE.png or FILE.svg", param_hint="--picture")
    with reporting(debug=debug):
        if picture is not None:
            # Where it is missing, before the work.
            matplotlib()
        plan = Plan(
            recipes=tuple(wanted), calibrations=tuple(TextPart.parse(value) for value in calib or ()),
            texts=tuple(texts), tasks=tuple(tasks), samples=samples, seq_len=seq_len, context=context, limit=limit,
            percentile=level, keep=tuple(keep or ()),
            latency=LatencySettings(latency_prompt, latency_batch) if timed else None,
        )  # fmt: skip

        def load() -> Any:
            return load_model(model, dtype=dtype, device=device)

        first = load()
        if hasattr(first, "quantization"):
            raise QuambaError(f"found a quantized model in {model!r}; expected the float model, to quantize it here")
        versions = provenance.versions()
        identity = {
            "model_sha256": provenance.model_sha256(first),
            "dtype": dtype.value,
            "device": device.partition(":")[0],
            **({"timed_on": timed_on(first.device)} if timed else {}),
            **plan.identity(),
            "versions": {name: versions[name] for name in _VERSIONS if name in versions},
        }
        hardware = provenance.hardware(first.device)
        del first
        path = state or Path(f"quamba-compare-{Path(model).resolve().name}.json")
        kept = StateFile(path, identity, recipes=plan.recipes, restart=restart)
        message(f"{path}: {len(kept.trials)} results there" if kept.trials else f"{path}: results are kept here")

        def add(trial: Trial) -> None:
            kept.add(trial)
            calibration = f" on {trial.calibration}" if trial.calibration else ""
            message(f"{trial.name}{calibration}: done, quantized in {trial.seconds:.1f} s")

        trials = run_trials(plan, load, load_tokenizer(model), done=kept.trials, keep=add, batch_size=batch)
        lines = lines_of(trials)
        about = {
            "model": model, **identity, "date": provenance.now(), "hardware": hardware, "versions": versions,
            "seeds": SEEDS, "confidence": CONFIDENCE, "resamples": RESAMPLES,
        }  # fmt: skip
        content = {**about, "lines": [line.to_dict() for line in lines], "notes": notes(lines)}
        if picture is not None:
            figure, _ = trades(content)
            write_file(picture, image(figure, picture.suffix[1:]))
            message(f"{picture}: written")
        if json:
            print_json(content)
        elif as_markdown:
            print(markdown(lines))
        else:
            console = output()
            rows = cells(lines)
            table = Table(title=f"{model}, computed in {dtype.value}", title_justify="left")
            for number, name in enumerate(rows[0]):
                table.add_column(name, justify="left" if number == 0 else "right")
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table)
            for note in notes(lines):
                console.print(note)
            console.print(f"{about['date']}, {hardware}, model {identity['model_sha256'][:16]}")
