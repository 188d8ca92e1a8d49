"""Quantize the model that comes with the project, and see what that costs and gains.

python examples/quickstart.py

Float is the shipped bfloat16 checkpoint, computed in float32, which is faster than bfloat16 on most CPUs.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from quamba.eval import perplexity
from quamba.recipes import DEFAULT_RECIPE
from quamba.text import read_ids, windows

HERE = Path(__file__).resolve().parent
MODEL = HERE / "mamba-books"
OUT = HERE.parent / "build" / "mamba-books-int8"
PROMPT = "The captain looked out over the sea, and"


def speed_of_generation(model: Any, prompt: Tensor, tokens: int) -> float:
    """Tokens a second of greedy decoding, batch 1; the better of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return tokens / min(seconds)


def row(name: str, model: Any, evaluation: Tensor, *, prompt: Tensor, tokens: int, disk: int) -> list[str]:
    """One line of the table."""
    start = time.perf_counter()
    found = perplexity(model, evaluation, context=512)
    seconds = time.perf_counter() - start
    generation = speed_of_generation(model, prompt, tokens)
    return [
        name,
        f"{found.perplexity:.3f}",
        f"{disk / 1e6:.2f} MB",
        f"{found.tokens / seconds:.0f}",
        f"{generation:.0f}",
    ]


def continuation(model: Any, tokenizer: Any, prompt: Tensor, tokens: int) -> str:
    """The prompt and what the model makes of it."""
    ids = model.generate(prompt, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.2)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def main(*, sequences: int = 128, evaluated: int | None = None, tokens: int = 64, out: Path = OUT) -> None:
    """Run it all.

    Args:
        sequences: of 512 tokens, to calibrate on.
        evaluated: how many tokens of the evaluation text to read; None for all.
        tokens: how many to generate.
        out: where to save the quantized model.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    calibration = windows(read_ids(tokenizer, HERE / "texts" / "calibration.txt"), length=512, count=sequences)
    evaluation = read_ids(tokenizer, HERE / "texts" / "evaluation.txt")[:evaluated]
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    console.print(
        f"calibrating on {calibration.numel()} tokens, evaluating on {len(evaluation)}; this takes a minute or two"
    )

    table = Table(title="mamba-books on this machine (tokens evaluated and generated a second)")
    table.add_column("model")
    for column in ("perplexity", "on disk", "evaluated/s", "generated/s"):
        table.add_column(column, justify="right")
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    disk = (MODEL / "model.safetensors").stat().st_size
    table.add_row(*row("float", original, evaluation, prompt=prompt, tokens=tokens, disk=disk))
    for recipe in ("naive", DEFAULT_RECIPE):
        quantized = AutoModelForCausalLM.from_pretrained(MODEL)
        quamba.quantize(quantized, calibration.split(8), recipe)
        with TemporaryDirectory() as scratch:
            folder = out if recipe == DEFAULT_RECIPE else Path(scratch) / "model"
            quantized.save_pretrained(folder)
            disk = (folder / "model.safetensors").stat().st_size
        name = f"{recipe}, INT8"
        table.add_row(*row(name, quantized, evaluation, prompt=prompt, tokens=tokens, disk=disk))
    tokenizer.save_pretrained(out)
    console.print(table)

    reloaded = AutoModelForCausalLM.from_pretrained(out)
    sample = evaluation[None, :512]
    with torch.no_grad():
        if not torch.equal(reloaded(sample).logits, quantized(sample).logits):
            raise SystemExit("the reloaded model's logits differ from those of the model that was saved")
    console.print(f"saved in {out} and loaded again: the logits are equal, bit for bit\n", soft_wrap=True)
    for name, model in (("float", original), (f"{DEFAULT_RECIPE}, INT8", reloaded)):
        console.print(f"[bold]{name}[/bold]: {continuation(model, tokenizer, prompt, tokens)}\n", soft_wrap=True)


if __name__ == "__main__":
    main()
