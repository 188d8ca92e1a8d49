"""quamba eval: the perplexity of a float or quantized model on a text."""

import time
from pathlib import Path
from typing import Annotated

import typer

from quamba.cli.common import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    load_model,
    load_tokenizer,
    print_json,
    reporting,
)
from quamba.eval import perplexity
from quamba.text import read_ids


def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text file.", exists=True, dir_okay=False)],
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="From one window to the next; by default the context: no overlap.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 8,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the perplexity of MODEL on a text."""
    if stride is not None and stride > context:
        raise typer.BadParameter(f"found {stride}; expected at most the context, {context}", param_hint="--stride")
    with reporting(debug=debug):
        loaded = load_model(model, dtype=dtype, device=device)
        ids = read_ids(load_tokenizer(model), text)
        if limit is not None:
            ids = ids[: context + (limit - 1) * (stride or context)]
        start = time.perf_counter()
        found = perplexity(loaded, ids, context=context, stride=stride, batch_size=batch_size)
        seconds = time.perf_counter() - start
        if json:
            print_json(
                {
                    "model": model,
                    "text": str(text),
                    "perplexity": found.perplexity,
                    "nll": found.nll,
                    "tokens": found.tokens,
                    "windows": len(found.window_tokens),
                    "context": context,
                    "stride": stride or context,
                    "seconds": seconds,
                }
            )
        else:
            print(f"perplexity {found.perplexity:.4f}")
            print(f"nll        {found.nll:.4f} nats per token")
            print(f"tokens     {found.tokens} in {len(found.window_tokens)} windows of {context}")
            print(f"speed      {found.tokens / seconds:.0f} tokens/s")
