"""Peak memory of quantize() on a model of a given shape with random weights.

    python benchmarks/memory.py --d-model 2560 --layers 64 --vocabulary 50280 --samples 8 --length 512

Prints one line of JSON: the bytes of the float and of the quantized model, the process's peak before and after
quantize(), and the peak over the float model's size. The process's own peak (ru_maxrss) is read, so the interpreter
and the libraries are counted in.
"""

import argparse
import json
import resource
import sys
import time

import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import quamba
from quamba.recipes import DEFAULT_RECIPE


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_bytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def random_model(config: MambaConfig, dtype: torch.dtype) -> nn.Module:
    """A model on the CPU that never held float32 weights: made on meta, filled in its own dtype."""
    with torch.device("meta"):
        model = MambaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.arange(1, parameter.shape[1] + 1).log().expand_as(parameter))
            elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.fill_(1.0)
            elif name.endswith("dt_proj.bias"):
                parameter.fill_(-4.0)
            else:
                parameter.normal_(std=0.02)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=50280)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    args = parser.parse_args()

    config = MambaConfig(hidden_size=args.d_model, num_hidden_layers=args.layers, vocab_size=args.vocabulary)
    model = random_model(config, getattr(torch, args.dtype))
    float_bytes, before = model_bytes(model), peak_bytes()
    ids = torch.randint(args.vocabulary, (args.samples, args.length))
    start = time.perf_counter()
    quamba.quantize(model, [ids], args.recipe)
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    print(
        json.dumps(
            {
                "shape": {"d_model": args.d_model, "layers": args.layers, "vocabulary": args.vocabulary},
                "recipe": args.recipe,
                "tokens": ids.numel(),
                "float_bytes": float_bytes,
                "quantized_bytes": model_bytes(model),
                "peak_before_bytes": before,
                "peak_bytes": peak,
                "peak_minus_1GiB_over_float": (peak - 2**30) / float_bytes,
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
