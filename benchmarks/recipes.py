"""What each recipe costs: perplexity and KL to the float model, for models, calibration texts and evaluation texts.

    python benchmarks/recipes.py --model examples/mamba-books \\
        --calib books=books.txt:0:65536 --calib wikitext=valid.txt:0:65536 \\
        --text books=books.txt:65536: --text wikitext=test.txt:0:102400 --out results.json

The reference's logits are kept in memory: 4 bytes for each token and each word of the vocabulary.
A text is NAME=FILE[:FIRST:LAST], a range of its tokens. Float here is the original model in float32. The increase of
perplexity comes with the standard error of the paired difference over windows.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from quamba.eval.perplexity import cache_logits, compare


@dataclass(frozen=True)
class Text:
    """A range of a text's tokens."""

    name: str
    path: str
    first: int
    last: int | None

    @classmethod
    def parse(cls, argument: str) -> "Text":
        name, _, rest = argument.partition("=")
        path, *limits = rest.split(":")
        first, last = ([*limits, "", ""])[:2]
        return cls(name, path, int(first or 0), int(last) if last else None)

    def ids(self, tokenizer: Any) -> Tensor:
        ids = tokenizer(Path(self.path).read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
        return ids[self.first : self.last]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each recipe; for each calibration and text, the increase of perplexity in percent and the KL."""
    pairs = list(dict.fromkeys((row["calibration"], row["text"]) for row in rows))
    lines = [
        "| recipe | " + " | ".join(f"{calibration} → {text}" for calibration, text in pairs) + " |",
        "|---" * (len(pairs) + 1) + "|",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        cells = [
            f"{row['increase_percent']:+.2f} ± {row['standard_error_percent']:.2f} % ({row['kl']:.4f})"
            for pair in pairs
            for row in rows
            if (row["recipe"], row["calibration"], row["text"]) == (recipe, *pair)
        ]
        mark = " (simulation)" if quamba.RECIPES[recipe].simulated else ""
        lines.append(f"| `{recipe}`{mark} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", action="append", type=Text.parse, required=True)
    parser.add_argument("--text", action="append", type=Text.parse, required=True)
    parser.add_argument("--recipes", default=",".join(quamba.RECIPES))
    parser.add_argument("--percentile", default=None, help="of x; a fraction or 'search'")
    parser.add_argument("--keep", action="append", default=[])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", default=None, help="write the rows as JSON here")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = {text.name: text.ids(tokenizer) for text in args.calib}
    evaluation = {text.name: text.ids(tokenizer) for text in args.text}
    percentile = args.percentile if args.percentile in (None, "search") else float(args.percentile)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    original = load()
    quamba.quantize(original, None, "float")
    references = {name: cache_logits(original, ids, context=args.context) for name, ids in evaluation.items()}
    del original
    rows = []
    for recipe in args.recipes.split(","):
        for calib_name, ids in calibration.items():
            count = min(args.samples, len(ids) // args.context)
            windows = ids[: count * args.context].view(count, args.context).split(8)
            model = load()
            start = time.perf_counter()
            quamba.quantize(model, windows, recipe, percentile=percentile, keep=args.keep)
            seconds = time.perf_counter() - start
            for text_name, text_ids in evaluation.items():
                start = time.perf_counter()
                result = compare(model, references[text_name], text_ids, context=args.context)
                base = result.reference.perplexity
                row = {
                    "model": args.model, "recipe": recipe, "calibration": calib_name, "text": text_name,
                    "tokens": result.reference.tokens, "float": base, "perplexity": result.model.perplexity,
                    "increase_percent": 100 * (result.model.perplexity / base - 1),
                    "standard_error_percent": 100 * result.nll_difference_stderr, "kl": result.kl,
                    "quantize_seconds": seconds, "eval_seconds": time.perf_counter() - start,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{recipe:12s} calib {calib_name:9s} text {text_name:9s} {base:8.3f} -> {row['perplexity']:8.3f} "
                    f"{row['increase_percent']:+7.3f}% +- {row['standard_error_percent']:.3f}  KL {result.kl:.5f}  "
                    f"({seconds:.0f} s to quantize, {row['eval_seconds']:.0f} s to evaluate)",
                    flush=True,
                )
    environment = {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "quamba": quamba.__version__, "processor": platform.processor(),
        "command": " ".join(sys.argv),
    }  # fmt: skip
    print(markdown(rows))
    if args.out:
        Path(args.out).write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
