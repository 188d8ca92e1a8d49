"""What the commands share: options, how errors are told, how models are found, what goes to stdout."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from quamba.checkpoint import load
from quamba.errors import QuambaError, RecipeError
from quamba.recipe import QuantSpec, Recipe
from quamba.recipes import get_recipe


class Dtype(str, Enum):
    """Dtypes of the parts that stay in float."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def as_torch(self) -> torch.dtype:
        """The dtype itself."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.value]


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder or a hub name, float or quantized.")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Dtype of what is float; by default that of the checkpoint.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the libraries' messages, and a traceback on failure.")]

# Wide enough for every table, so that nothing is cut off in a file or a pipe.
_WIDTH = 160


def message(text: str) -> None:
    """A line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def output() -> Console:
    """Where tables go: stdout."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def print_json(content: Any) -> None:
    """One line on stdout; numbers that JSON does not have become null."""
    print(json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), allow_nan=False))


@contextmanager
def reporting(*, debug: bool) -> Iterator[None]:
    """Turn a failure into a one-line reason and exit code 1; with `debug`, let it through."""
    if debug:
        yield
        return
    _quieten()
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, QuambaError | OSError | ValueError):
            reason = f"{type(error).__name__}: {reason} (--debug shows where)"
        message(f"quamba: {reason}")
        raise typer.Exit(1) from error


def _quieten() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    # Read by datasets when it is imported, which takes a second that most commands need not spend.
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def is_quantized(folder: Path) -> bool:
    """True for a folder that quamba saved a model in."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == "quamba")
    except (FileNotFoundError, KeyError, TypeError):
        return False
    except ValueError as error:
        raise QuambaError(
            f"found {str(folder / 'config.json')!r}, which is not JSON ({error}); expected a model"
        ) from error


def load_model(name: str, *, dtype: Dtype | None, device: str) -> Any:
    """A float or quantized model, in evaluation mode.

    Raises:
        QuambaError: there is no such folder, or it holds a damaged quantized model.
        OSError, ValueError: transformers finds no model under that name, or none that it knows.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(name)
    if not folder.is_dir() and (folder.exists() or name.count("/") > 1 or name[:1] in ("/", ".", "~")):
        raise QuambaError(f"found no folder {name!r}; expected a local folder with a model, or a hub name")
    if folder.is_dir() and is_quantized(folder):
        return load(folder, device=device, dtype=None if dtype is None else dtype.as_torch)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if dtype is None else dtype.as_torch)
    return model.to(device).eval()


def chosen_recipe(name: str) -> Recipe:
    """One of RECIPES by its name, or a JSON file with a recipe."""
    try:
        return Recipe.from_json(Path(name).read_text(encoding="utf-8")) if name.endswith(".json") else get_recipe(name)
    except (RecipeError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--recipe") from error


def chosen_percentile(text: str | None) -> float | str | None:
    """Where x is clipped: a fraction, "search", or None for what the recipe says."""
    if text is None or text == "search":
        return text
    try:
        return QuantSpec("tensor", "percentile", float(text)).percentile
    except ValueError as error:
        raise typer.BadParameter(
            f"found {text!r}; expected a fraction in (0.5, 1], such as 0.9999, or 'search'", param_hint="--percentile"
        ) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def write_file(path: Path, content: bytes) -> None:
    """Beside, then renamed: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    os.replace(beside, path)


def size(count: float) -> str:
    """Bytes for people: 4831838 -> "4.83 MB"."""
    if count < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log10(count)) // 3, 3)
    return f"{count / 1000**power:.2f} {('kB', 'MB', 'GB')[power - 1]}"


def folder_bytes(folder: Path, pattern: str = "*.safetensors") -> int:
    """The size of a folder's weight files."""
    return sum(file.stat().st_size for file in folder.glob(pattern))
