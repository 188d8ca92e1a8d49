"""quamba bench: latency, memory and bandwidth of a model, or of random weights of a shape."""

import json as json_module
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from quamba.bench import SHAPES, find_shape, measure
from quamba.bench.building import quantize_blindly, random_model
from quamba.bench.peer import make_peer
from quamba.bench.profile import markdown
from quamba.bench.subjects import Quantized, Subject
from quamba.bench.tables import tables
from quamba.bench.timing import Plan
from quamba.checkpoint.sizes import checkpoint_dtype
from quamba.cli.common import (
    DebugOption,
    Dtype,
    DtypeOption,
    chosen_recipe,
    load_model,
    message,
    output,
    reporting,
    write_file,
)
from quamba.errors import QuambaError, RecipeError
from quamba.eval.trials import FLOAT
from quamba.recipe import Recipe
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
    recipes: Annotated[
        str | None,
        typer.Option(
            "--recipes",
            "--recipe",
            metavar="A,B,...",
            help=f"For a float model or a shape, timed in turn; float is the model by quamba's float mixers. "
            f"By default {DEFAULT_RECIPE}.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Time this beside them: mamba-ssm, in float, with random weights.")
    ] = None,
    batch: Annotated[str, typer.Option(help=f"Sequences of the decode steps. {_COMMA}")] = "1",
    length: Annotated[str, typer.Option(help=f"Tokens of the prompts. {_COMMA}")] = "512",
    new_tokens: Annotated[
        str, typer.Option("--output", "--new-tokens", help=f"Tokens generated for TTLT; 0 leaves it out. {_COMMA}")
    ] = "64",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every model.")] = 3,
    runs: Annotated[int, typer.Option(min=1, help="Runs in a turn.")] = 20,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="For one model in one case: what is slow has fewer runs, a TTLT that is too slow is computed.",
        ),
    ] = 30.0,
    kernels: Annotated[
        int | None,
        typer.Option(min=0, help="Kernels to name in the breakdown; 0 leaves it out. By default 12 for one recipe."),
    ] = None,
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help="Where to run; by default cuda where there is one.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the profile alone, in Markdown.")] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write every figure here.")] = None,
    debug: DebugOption = False,
) -> None:
    """Time MODEL: TTFT (a prompt's prefill), TPOT (a decode step), TTLT (both), graph and eager, and memory."""
    if (model is None) == (shape is None):
        raise typer.BadParameter("expected either MODEL or --shape", param_hint="MODEL")
    batches, lengths = _numbers(batch, "--batch"), _numbers(length, "--length")
    counts = [] if new_tokens.strip() == "0" else _numbers(new_tokens, "--output")
    wanted = None if recipes is None else [chosen_recipe(name.strip()) for name in recipes.split(",")]
    with reporting(debug=debug):
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        chosen = dtype or (Dtype.float16 if where.type == "cuda" else Dtype.float32)
        subjects: list[Subject] = list(_subjects(model, shape, wanted, dtype=chosen, device=where))
        if against is not None:
            peer: Any = subjects[0]
            subjects.append(make_peer(against, peer.model, dtype=chosen.as_torch, device=where))
        names = [subject.name for subject in subjects]
        found = measure(
            model=str(shape or model),
            dtype=chosen.as_torch,
            subjects=subjects,
            reference=against or (FLOAT if FLOAT in names and len(names) > 1 else None),
            batches=batches,
            lengths=lengths,
            new_tokens=counts,
            plan=Plan(rounds=rounds, runs=runs, seconds=seconds),
            kernels=kernels if kernels is not None else 12 if len(wanted or [""]) == 1 else 0,
        )
        if json is not None:
            write_file(json, f"{json_module.dumps(found.to_dict(), indent=1)}\n".encode())
        if as_markdown:
            print(markdown(found))
            return
        console = output()
        for table in tables(found):
            console.print(table)


def _numbers(text: str, option: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"found {text!r}; expected positive numbers separated by commas", param_hint=option)
    return list(dict.fromkeys(map(int, parts)))


def _subjects(
    model: str | None, shape: str | None, recipes: list[Recipe] | None, *, dtype: Dtype, device: torch.device
) -> Iterator[Quantized]:
    """A fresh model for each recipe, or the quantized model that was named."""
    wanted = recipes or [get_recipe(DEFAULT_RECIPE)]
    names = [recipe.name for recipe in wanted]
    if len(set(names)) < len(names):
        raise RecipeError(f"found the recipes {', '.join(names)}; expected a name of its own for each")
    for recipe in wanted:
        message(f"making {shape or model} by {recipe.name} on {device}")
        if shape is not None:
            made = random_model(find_shape(shape), dtype=dtype.as_torch, device=device)
            yield Quantized(recipe.name, quantize_blindly(made, recipe))
            continue
        loaded: Any = load_model(str(model), dtype=dtype, device=str(device))
        if not hasattr(loaded, "quantization"):
            stored = checkpoint_dtype(loaded)
            yield Quantized(recipe.name, quantize_blindly(loaded, recipe), dtype=stored)
        elif recipes is None:
            yield Quantized(loaded.quantization.recipe.name, loaded)
        else:
            raise QuambaError(f"found --recipes for {model!r}, which is quantized; expected the float model")
