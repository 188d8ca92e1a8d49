"""The largest batch that memory holds, found by halving."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# What torch says where no exception of its own class is raised: its allocator on the CPU, and CUDA through C.
_MESSAGES = ("out of memory", "can't allocate memory")


def starting_batch(device: torch.device | str) -> int:
    """Where to start: many sequences on a GPU, few on a CPU, where more of them are no faster."""
    return 8 if torch.device(device).type == "cpu" else 64


def with_fitting_batch(run: Callable[[int], T], *, start: int) -> tuple[T, int]:
    """Call `run` with a batch size, with half of it after each failure for memory, until it succeeds.

    Args:
        run: does everything anew each time.
        start: the first batch size.

    Returns:
        What `run` returned, and the batch size with which it did.
    """
    size = start
    while True:
        try:
            return run(size), size
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)
            if size == 1 or not out_of_memory:
                raise
        # After the handler, when nothing refers to the failed run's tensors any more.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
