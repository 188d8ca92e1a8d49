"""The search for a batch size that fits."""

import pytest
import torch

from quamba.eval.fitting import starting_batch, with_fitting_batch


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_halves_until_it_fits(error: RuntimeError) -> None:
    tried = []

    def run(size: int) -> str:
        tried.append(size)
        if size > 5:
            raise error
        return "done"

    assert with_fitting_batch(run, start=24) == ("done", 3)
    assert tried == [24, 12, 6, 3]


def test_other_errors_pass_through_at_once() -> None:
    tried = []

    def run(size: int) -> None:
        tried.append(size)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        with_fitting_batch(run, start=8)
    assert tried == [8]


def test_one_that_does_not_fit_raises() -> None:
    def run(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        with_fitting_batch(run, start=4)


def test_starts_higher_on_a_gpu() -> None:
    assert starting_batch("cpu") < starting_batch("cuda")
