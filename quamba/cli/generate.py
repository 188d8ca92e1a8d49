"""quamba generate: continue a prompt."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from quamba.cli.common import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    load_model,
    load_tokenizer,
    reporting,
)
from quamba.errors import QuambaError
from quamba.progress import track


class _Counter(BaseStreamer):  # type: ignore[misc]
    """Moves a progress bar on with every token."""

    def __init__(self, steps: Iterator[int]) -> None:
        self.steps = steps
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            next(self.steps, None)
        self.prompt_seen = True

    def end(self) -> None:
        for _ in self.steps:
            pass


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    debug: DebugOption = False,
) -> None:
    """Print the prompt and MODEL's continuation of it."""
    with reporting(debug=debug):
        loaded = load_model(model, dtype=dtype, device=device)
        tokenizer = load_tokenizer(model)
        encoded = tokenizer(prompt, return_tensors="pt").to(device)
        if encoded["input_ids"].shape[1] == 0:
            raise QuambaError("found a prompt without tokens; expected some text")
        live = sys.stdout.isatty()
        streamer: Any = (
            TextStreamer(tokenizer, skip_special_tokens=True)
            if live
            else _Counter(track(range(max_new_tokens), "generating", total=max_new_tokens))
        )
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        end = tokenizer.eos_token_id
        torch.manual_seed(seed)
        ids = loaded.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=streamer,
            **sampling,
        )
        if not live:
            print(tokenizer.decode(ids[0], skip_special_tokens=True))
