"""quamba quantize: a float model in, a folder with the quantized one and its tokenizer out."""

import time
from pathlib import Path
from typing import Annotated

import typer

from quamba import quantize as pipeline
from quamba.cli.common import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    chosen_percentile,
    chosen_recipe,
    folder_bytes,
    is_quantized,
    load_model,
    load_tokenizer,
    message,
    reporting,
    size,
)
from quamba.errors import QuambaError
from quamba.recipes import DEFAULT_RECIPE, RECIPES
from quamba.text import calibration_sequences


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float model: a local folder or a hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a text file; a JSON-lines, CSV or Parquet file or a datasets folder with a column "
            "'text' or 'input_ids'; or a hub dataset. Needed by every recipe with static scales."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help=f"One of {', '.join(RECIPES)}; or a JSON file with a recipe.")
    ] = DEFAULT_RECIPE,
    samples: Annotated[int, typer.Option(min=1, help="At most so many calibration sequences.")] = 512,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens per calibration sequence.")] = 512,
    percentile: Annotated[
        str | None, typer.Option(metavar="F|search", help="Where x is clipped: a fraction such as 0.9999, or 'search'.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="What to keep in float: layers.0, 'layers.*.x', head, embedding; repeatable."
        ),
    ] = None,
    calib_subset: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    calib_split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    debug: DebugOption = False,
) -> None:
    """Quantize MODEL and save it, with its tokenizer, in OUT."""
    chosen, level = chosen_recipe(recipe), chosen_percentile(percentile)
    if chosen.simulated:
        raise typer.BadParameter(f"found {chosen.label!r}; expected a recipe to save", param_hint="--recipe")
    with reporting(debug=debug):
        _check_out(model, out)
        loaded = load_model(model, dtype=dtype, device=device)
        tokenizer = load_tokenizer(model)
        sequences = None
        if calib is not None:
            sequences = calibration_sequences(
                calib, tokenizer, length=seq_len, count=samples, subset=calib_subset, split=calib_split
            )
            message(f"calibrating on {len(sequences)} sequences, {sum(len(s) for s in sequences)} tokens")
        start = time.perf_counter()
        pipeline(loaded, sequences, chosen, samples=samples, percentile=level, keep=keep or ())
        seconds = time.perf_counter() - start
        loaded.save_pretrained(out)
        tokenizer.save_pretrained(out)
        before = folder_bytes(Path(model))
        change = f", {size(before)} before" if before else ""
        message(f"{out}: recipe {chosen.name}, {size(folder_bytes(out))}{change}, quantized in {seconds:.1f} s")


def _check_out(model: str, out: Path) -> None:
    """Refuse to write over a model that is not a quantized one of ours."""
    if (out / "config.json").exists() and not is_quantized(out):
        what = "the model to quantize" if out.resolve() == Path(model).resolve() else "another model"
        raise QuambaError(
            f"found {what} in {str(out)!r}; expected a new folder, or one with a quantized model to replace"
        )
