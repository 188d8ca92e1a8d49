"""Calibrate on your own text, and see whether that is better than calibrating on somebody else's.

    python examples/calibrate_on_your_data.py --text YOURS.txt --out MODEL-INT8

The first part of your text calibrates, the rest is what both calibrations are judged on, beside the float model. The
model that is saved is the one calibrated on your text. Without arguments everything is what ships with the project.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from quamba.eval.comparing import run_trials
from quamba.eval.table import cells, lines_of
from quamba.eval.trials import Plan
from quamba.recipes import DEFAULT_RECIPE, RECIPES
from quamba.text import TextPart, windows

HERE = Path(__file__).resolve().parent
MODEL = HERE / "mamba-books"
SHIPPED = HERE / "texts" / "calibration.txt"
YOURS = HERE / "texts" / "evaluation.txt"
OUT = HERE.parent / "build" / "calibrated-on-your-data"


def main(
    *,
    model: str | Path = MODEL,
    text: str | Path = YOURS,
    share: float = 0.5,
    recipe: str = DEFAULT_RECIPE,
    samples: int = 128,
    length: int = 512,
    limit: int | None = None,
    out: Path = OUT,
) -> None:
    """Run it all.

    Args:
        model: a float model.
        text: your text.
        share: how much of it calibrates.
        recipe: to quantize with.
        samples, length: calibration sequences, and tokens in each.
        limit: judge on so many windows of `length` tokens only; None for all.
        out: where to save the model calibrated on your text.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = len(TextPart.parse(str(text)).ids(tokenizer))
    cut = int(share * tokens)
    yours = TextPart("yours", str(text), 0, cut)
    plan = Plan(
        recipes=(RECIPES[recipe],),
        calibrations=(TextPart("shipped", str(SHIPPED)), yours),
        texts=(TextPart("rest of yours", str(text), cut),),
        samples=samples,
        seq_len=length,
        context=length,
        limit=limit,
    )

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()

    console.print(f"{text}: {cut} tokens to calibrate on, {tokens - cut} to judge by", soft_wrap=True)
    rows = cells(lines_of(run_trials(plan, load, tokenizer)))
    table = Table(*rows[0], title=f"{Path(model).name}: whose text to calibrate on")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)

    # What quantize() takes: any iterable of token ids; here windows of your text, spread over its first part.
    quantized = AutoModelForCausalLM.from_pretrained(model)
    quamba.quantize(quantized, list(windows(yours.ids(tokenizer), length=length, count=samples)), recipe)
    quantized.save_pretrained(out)
    tokenizer.save_pretrained(out)
    console.print(f"calibrated on your text and saved in {out}", soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--text", default=YOURS)
    parser.add_argument("--share", type=float, default=0.5, help="how much of the text calibrates")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, choices=list(RECIPES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=OUT)
    main(**vars(parser.parse_args()))
