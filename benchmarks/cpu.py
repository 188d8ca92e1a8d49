"""Speed on a CPU: the float model in transformers' own code against the quantized one, in turn, in one process.

    python benchmarks/cpu.py --model examples/mamba-books --text examples/texts/evaluation.txt

Prints seconds to quantize, tokens per second of evaluation and of generation (median of interleaved runs), their
ratios, and the size on disk.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from quamba.recipes import DEFAULT_RECIPE


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def evaluate(model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        for window in ids:
            model(window[None], use_cache=False)


def generate(model: Any, prompt: Tensor, new_tokens: int) -> None:
    model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4, help="of the text, per evaluation run")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of the float model; both run from it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(Path(args.text).read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = ids[: len(ids) // args.context * args.context].view(-1, args.context)
    dtype = getattr(torch, args.dtype)
    models = {
        name: AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval() for name in ("float", "quantized")
    }
    seconds = timed(lambda: quamba.quantize(models["quantized"], windows[: args.samples].split(8), args.recipe))
    with tempfile.TemporaryDirectory() as folder:
        models["quantized"].save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))

    prompt = windows[:1, :16]
    tasks: dict[str, tuple[Callable[[Any], None], int]] = {
        "evaluation": (lambda model: evaluate(model, windows[: args.windows]), args.windows * args.context),
        "generation": (lambda model: generate(model, prompt, args.new_tokens), args.new_tokens),
    }
    found: dict[str, Any] = {
        "recipe": args.recipe, "threads": args.threads, "quantize_seconds": seconds,
        "calibration_tokens": min(args.samples, len(windows)) * args.context, "quantized_bytes": size,
        "size_ratio_to_bf16": size / sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors")),
    }  # fmt: skip
    for task, (run, tokens) in tasks.items():
        times: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            run(model)
        for _ in range(args.runs):
            for name, model in models.items():
                times[name].append(timed(lambda run=run, model=model: run(model)))
        for name in models:
            found[f"{task}_{name}_tokens_per_second"] = tokens / statistics.median(times[name])
        ratios = [slow / fast for slow, fast in zip(times["float"], times["quantized"], strict=True)]
        found[f"{task}_speedup"] = statistics.median(ratios)
        found[f"{task}_speedup_range"] = [min(ratios), max(ratios)]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
