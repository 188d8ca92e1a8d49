"""The command `quamba`: quantize, evaluate, run and inspect a model from a shell.

Results go to stdout, everything else to stderr. Exit codes: 0; 2 for wrong usage; 1 for a failure, with a one-line
reason.
"""

from typing import Annotated

import typer

from quamba.cli.analyze import analyze
from quamba.cli.bench import bench
from quamba.cli.compare import compare
from quamba.cli.evaluate import evaluate
from quamba.cli.generate import generate
from quamba.cli.inspect import inspect
from quamba.cli.quantize import quantize

app = typer.Typer(
    name="quamba",
    help="Post-training INT8 quantization of Mamba, Falcon-Mamba and Jamba language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize)
app.command("eval")(evaluate)
app.command("analyze")(analyze)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("inspect")(inspect)
app.command("bench")(bench)


def _version(wanted: bool) -> None:
    if wanted:
        from quamba import __version__
        from quamba.ops import cuda, native

        typer.echo(f"quamba {__version__}")
        typer.echo(f"CPU ops: {native.description()}")
        typer.echo(f"CUDA ops: {'compiled kernels' if cuda.MISSING is None else f'none: {cuda.MISSING}'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and how the ops run here.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()
