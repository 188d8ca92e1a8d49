"""quamba bench: latency, memory and bandwidth of a model, or of random weights of a shape."""

import json as json_module
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from quamba.bench import SHAPES, find_shape, measure
from quamba.bench.building import quantize_blindly, random_model
from quamba.bench.peer import make_peer
from quamba.bench.subjects import Quantized, Subject
from quamba.bench.tables import tables
from quamba.bench.timing import Plan
from quamba.cli.common import DebugOption, Dtype, DtypeOption, load_model, message, output, reporting
from quamba.recipes import DEFAULT_RECIPE, get_recipe

_COMMA = "Separated by commas."


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A local folder or a hub name; a float model is quantized with random calibration data.",
        ),
    ] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights instead of a model: {', '.join(SHAPES)}.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Time this beside it, in turn: mamba-ssm, in float, with random weights.")
    ] = None,
    batch: Annotated[str, typer.Option(help=f"Sequences of the decode steps. {_COMMA}")] = "1",
    length: Annotated[str, typer.Option(help=f"Tokens of the prompts. {_COMMA}")] = "512",
    new_tokens: Annotated[int, typer.Option(min=0, help="Generated for TTLT; 0 leaves it out.")] = 64,
    recipe: Annotated[str, typer.Option(help="For a float model or a shape.")] = DEFAULT_RECIPE,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every model.")] = 3,
    runs: Annotated[int, typer.Option(min=1, help="Runs in a turn.")] = 20,
    kernels: Annotated[int, typer.Option(min=0, help="Kernels to name in the breakdown; 0 leaves it out.")] = 12,
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help="Where to run; by default cuda where there is one.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write every figure here.")] = None,
    debug: DebugOption = False,
) -> None:
    """Time MODEL: TTFT (a prompt's prefill), TPOT (a decode step), TTLT (both), graph and eager, and memory."""
    if (model is None) == (shape is None):
        raise typer.BadParameter("expected either MODEL or --shape", param_hint="MODEL")
    batches, lengths = _numbers(batch, "--batch"), _numbers(length, "--length")
    with reporting(debug=debug):
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        chosen = dtype or (Dtype.float16 if where.type == "cuda" else Dtype.float32)
        message(f"making {shape or model} on {where}")
        made = _model(model, shape, recipe=recipe, dtype=dtype or chosen, device=where)
        subjects: list[Subject] = [Quantized("quamba", made)]
        if against is not None:
            subjects.append(make_peer(against, made, dtype=chosen.as_torch, device=where))
        quantization: Any = made.quantization
        found = measure(
            model=str(shape or model),
            recipe=quantization.recipe.name,
            dtype=chosen.as_torch,
            subjects=subjects,
            batches=batches,
            lengths=lengths,
            new_tokens=new_tokens,
            plan=Plan(rounds=rounds, runs=runs),
            kernels=kernels,
        )
        if json is not None:
            _write(json, json_module.dumps(found.to_dict(), indent=1))
        console = output()
        for table in tables(found):
            console.print(table)


def _numbers(text: str, option: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"found {text!r}; expected positive numbers separated by commas", param_hint=option)
    return [int(part) for part in parts]


def _model(model: str | None, shape: str | None, *, recipe: str, dtype: Dtype, device: torch.device) -> torch.nn.Module:
    chosen = get_recipe(recipe)
    if shape is not None:
        return quantize_blindly(random_model(find_shape(shape), dtype=dtype.as_torch, device=device), chosen)
    loaded: torch.nn.Module = load_model(str(model), dtype=dtype, device=str(device))
    return loaded if hasattr(loaded, "quantization") else quantize_blindly(loaded, chosen)


def _write(path: Path, text: str) -> None:
    """Beside, then renamed: never half a file."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)
