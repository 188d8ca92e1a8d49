"""Greedy decoding on a CUDA device beside the same quantized model on the CPU: the same tokens, or a tie?

    python benchmarks/greedy.py examples/mamba-books --text examples/texts/calibration.txt \
        --prompts-from examples/texts/evaluation.txt

Both generate from the same prompts. Where two sequences part, both devices compute the logits behind the tokens that
they have in common, from the prompt's first: their difference is the float error, and the parting is a tie where the
CPU's best two tokens are no further apart than that error could move two logits. A parting that is no tie exits 1.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from quamba.recipes import DEFAULT_RECIPE
from quamba.text import read_ids, windows


@torch.no_grad()
def generated(model: Any, prompts: Tensor, tokens: int) -> Tensor:
    """(B, L) prompts -> (B, tokens) greedy tokens, on the CPU."""
    out = model.generate(
        prompts.to(model.device), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return out[:, prompts.shape[1] :].cpu()


@torch.no_grad()
def last_logits(model: Any, ids: Tensor) -> Tensor:
    """(L,) tokens -> (V,) float32 logits behind them, on the CPU."""
    return model(ids[None].to(model.device)).logits[0, -1].float().cpu()


def partings(on_cpu: Any, on_device: Any, prompts: Tensor, tokens: int) -> int:
    """Print where sequences part, and whether at a tie; how many do so without one."""
    expected, found = generated(on_cpu, prompts, tokens), generated(on_device, prompts, tokens)
    wrong = 0
    for row, (left, right) in enumerate(zip(expected, found, strict=True)):
        differing = (left != right).nonzero()
        if not len(differing):
            continue
        step = int(differing[0])
        common = torch.cat([prompts[row], left[:step]])
        cpu, device = last_logits(on_cpu, common), last_logits(on_device, common)
        error = float((cpu - device).abs().max())
        gap = float((cpu[left[step]] - cpu[right[step]]).abs())
        wrong += gap > 2 * error
        kind = "a tie" if gap <= 2 * error else "NO TIE"
        print(
            f"prompt {row}: parts at token {step}, {kind}: CPU takes {int(left[step])}, the device {int(right[step])}, "
            f"{gap:.5f} apart in the CPU's logits; largest difference of a logit between the devices {error:.5f}"
        )
    same = int((expected == found).all(dim=1).sum())
    ties = len(prompts) - same - wrong
    print(f"{same} of {len(prompts)} sequences of {tokens} tokens are the same, {ties} part at a tie")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a float model")
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on: 128 sequences of 512 tokens")
    parser.add_argument("--prompts-from", type=Path, required=True, help="a text that the prompts come from")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--dtype", default="float32", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=512, help="to generate")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    calibration = windows(read_ids(tokenizer, args.text), length=512, count=128)
    on_cpu = quamba.quantize(model, calibration, args.recipe)
    on_device = copy.deepcopy(on_cpu).to(args.device)
    prompts = windows(read_ids(tokenizer, args.prompts_from), length=args.length, count=args.prompts)
    sys.exit(partings(on_cpu, on_device, prompts, args.tokens) > 0)


if __name__ == "__main__":
    main()
