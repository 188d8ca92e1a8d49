"""quamba analyze: which tensor costs what, where the outliers are, and how errors travel, as a report with figures."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import Tensor

from quamba.cli.common import (
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    chosen_recipe,
    load_model,
    load_tokenizer,
    message,
    output,
    print_json,
    reporting,
)
from quamba.errors import QuambaError
from quamba.recipes import DEFAULT_RECIPE, RECIPES
from quamba.text import read_ids


def analyze(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text file.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.", file_okay=False)],
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to calibrate on; by default the beginning of the text, and what follows it is evaluated.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(RECIPES)}, or a JSON file with a recipe; repeatable; by default naive and "
            f"{DEFAULT_RECIPE}."
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 64,
    windows: Annotated[int, typer.Option(min=2, help="Sequences for perplexity.")] = 48,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences for the blocks' errors and outliers.")] = 8,
    long_context: Annotated[int, typer.Option(min=2, help="Tokens per sequence for errors by position.")] = 2048,
    long_sequences: Annotated[int, typer.Option(min=1, help="How many of those.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 8,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a report on what quantization does to MODEL: report.html, figures, summary.json and arrays.npz."""
    recipes = [chosen_recipe(name) for name in recipe or ("naive", DEFAULT_RECIPE)]
    with reporting(debug=debug):
        # Here, because matplotlib takes its time, and to fail before the work where it is missing.
        from quamba.analysis import Settings, analyze, report
        from quamba.analysis.figures.canvas import matplotlib

        matplotlib()
        settings = Settings(
            context=context,
            calibration_sequences=samples,
            windows=windows,
            sequences=sequences,
            long_context=long_context,
            long_sequences=long_sequences,
            batch_size=batch_size,
        )
        loaded = load_model(model, dtype=dtype, device=device)
        tokenizer = load_tokenizer(model)
        ids = read_ids(tokenizer, text)
        if calib is None:
            calibration, ids = _split(ids, samples * context)
        else:
            calibration = read_ids(tokenizer, calib)
        found = analyze(loaded, calibration, ids, recipes=recipes, settings=settings)
        content = report.write(found, out, title=Path(model).name or model)
        message(f"{out / report.REPORT}: written in {found.about['seconds']:.0f} s")
        if json:
            print_json(content)
            return
        table = Table(title=f"{model}: one tensor quantized, the others in float", title_justify="left")
        for column in ("recipe", "tensor"):
            table.add_column(column)
        for column in ("perplexity", "standard error", "KL"):
            table.add_column(column, justify="right")
        for cost in found.costs:
            table.add_row(
                cost.recipe,
                cost.name,
                f"{cost.increase_percent:+.3f}%",
                f"{cost.stderr_percent:.3f}%",
                f"{cost.kl:.6f}",
            )
        output().print(table)


def _split(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first so many tokens, and the rest."""
    if ids.shape[0] <= count:
        raise QuambaError(
            f"found {ids.shape[0]} tokens, of which calibration takes {count}; expected more: give a longer text, "
            "fewer --samples, or another text with --calib"
        )
    return ids[:count], ids[count:]
