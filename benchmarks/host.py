"""What eager calls take of the host: `python benchmarks/host.py [--shape mamba-2.8b,mamba-130m] [--length 512,2048]`.

A quantized model with made-up values prefills a prompt and decodes a token: through a session without graphs, with one
op for all blocks and block by block through the single ops, and through the model's own forward, with and without a
cache. "host" is what a call takes to return, "back to back" what each of many calls takes by events on the stream: the
host's time, or the device's where that is longer.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quamba.bench.shapes import SHAPES
from quamba.bench.timing import Plan, time_in_turn
from quamba.checkpoint.skeleton import to_skeleton
from quamba.models import find_adapter, quantized_layers
from quamba.recipes import RECIPES
from quamba.runtime import RuntimeConfig, Session

CUDA = torch.device("cuda")


def make(shape: str, recipe: str) -> Any:
    """A quantized model whose latency is that of a real one: it does not depend on the values."""
    config = AutoConfig.for_model(SHAPES[shape].model_type, **SHAPES[shape].settings)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    skeleton = to_skeleton(model, RECIPES[recipe])
    model.to_empty(device=CUDA)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype is torch.int8:
            tensor.random_(-20, 21)
        else:
            tensor.fill_(0.01)
    return skeleton.finish()


def report(name: str, layers: int, call: Callable[[], object]) -> None:
    back_to_back = time_in_turn({name: call}, Plan(rounds=1, runs=10), CUDA)[name].median
    host = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    least, median = min(host), statistics.median(host)
    print(f"{name:44s}{median:9.3f}{least:9.3f}{1e3 * median / layers:12.1f}{back_to_back:14.3f}", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mamba-2.8b,mamba-130m")
    parser.add_argument("--recipe", default="quamba-c")
    parser.add_argument("--length", default="512,2048")
    arguments = parser.parse_args()
    for shape in arguments.shape.split(","):
        model = make(shape, arguments.recipe)
        for length in arguments.length.split(","):
            print(f"{torch.cuda.get_device_name()}, {shape}, {arguments.recipe}, L={length}; ms")
            print(f"{'':44s}{'host':>9s}{'least':>9s}{'us a layer':>12s}{'back to back':>14s}")
            time_model(model, int(length))


def time_model(model: Any, length: int) -> None:
    mixers: list[Any] = [mixer for _, mixer in quantized_layers(find_adapter(model), model)]
    ids = torch.randint(1000, (1, length), device=CUDA)
    session = Session(model, max_batch=1, config=RuntimeConfig(graphs=False))
    report("prefill, session", len(mixers), lambda: session.prefill(ids))
    report("prefill, model(ids, use_cache=False)", len(mixers), lambda: model(ids, use_cache=False, logits_to_keep=1))
    report("prefill, model(ids, use_cache=True)", len(mixers), lambda: model(ids, use_cache=True, logits_to_keep=1))
    report("decode, session", len(mixers), lambda: session.decode(ids[:, 0]))
    cache = model(ids, use_cache=True).cache_params
    report("decode, model(token, cache)", len(mixers), lambda: model(ids[:, :1], cache_params=cache, use_cache=True))
    kept = [(mixer.block, mixer.step_arguments) for mixer in mixers]
    for mixer in mixers:
        mixer.block = mixer.step_arguments = None
    single = Session(model, max_batch=1, config=RuntimeConfig(graphs=False))
    report("prefill, session, single ops", len(mixers), lambda: single.prefill(ids))
    report("decode, session, single ops", len(mixers), lambda: single.decode(ids[:, 0]))
    for mixer, (block, step_arguments) in zip(mixers, kept, strict=True):
        mixer.block, mixer.step_arguments = block, step_arguments


if __name__ == "__main__":
    main()
