"""The perplexity of a model on a text file."""

import time
from typing import Any

from torch import Tensor, nn

from quamba.eval.fitting import starting_batch, with_fitting_batch
from quamba.eval.perplexity import Perplexity, perplexity
from quamba.eval.results import TextResult
from quamba.nn.named import device_of
from quamba.text import TextPart


def first_windows(ids: Tensor, *, count: int | None, context: int, stride: int) -> Tensor:
    """The tokens (T,) of the first so many windows of a stream; None for all."""
    return ids if count is None else ids[: context + (count - 1) * stride]


def fitting_perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> tuple[Perplexity, int]:
    """`perplexity` and the batch size that it ran with; None finds what memory holds."""

    def run(size: int) -> Perplexity:
        return perplexity(model, ids, context=context, stride=stride, batch_size=size, progress=progress)

    if batch_size is not None:
        return run(batch_size), batch_size
    return with_fitting_batch(run, start=starting_batch(device_of(model)))


def measure_text(
    model: nn.Module,
    tokenizer: Any,
    part: TextPart,
    *,
    context: int = 512,
    stride: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    progress: bool | None = None,
) -> TextResult:
    """The perplexity of a causal language model on a text, in windows read from a zero state.

    Args:
        model: float or quantized.
        tokenizer: its tokenizer.
        part: the text.
        context: tokens per window.
        stride: from one window to the next; None for no overlap.
        batch_size: windows at once; None finds what memory holds.
        limit: only the first so many windows.
        progress: as in `perplexity`.

    Raises:
        QuambaError: the text cannot be read, or as in `perplexity`.
    """
    ids = first_windows(part.ids(tokenizer), count=limit, context=context, stride=stride or context)
    start = time.perf_counter()
    found, size = fitting_perplexity(
        model, ids, context=context, stride=stride, batch_size=batch_size, progress=progress
    )
    return TextResult(
        name=part.name,
        path=part.path,
        perplexity=found,
        context=context,
        stride=stride or context,
        batch_size=size,
        seconds=time.perf_counter() - start,
    )
