"""Every test of this folder needs a CUDA device and the kernels."""

from pathlib import Path

import pytest
import torch

import quamba.ops


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "no CUDA device" if not torch.cuda.is_available() else quamba.ops.cuda.MISSING
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """The references are float32: no tf32 in them. Inputs are the same in every run."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
