"""The CUDA kernels: loads quamba/_cuda.so, which registers them under the names and schemas of the ops.

Without the library every op raises on CUDA tensors and says how to build it: there is no slow path to fall into.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from quamba.errors import KernelError
from quamba.ops.registry import LIBRARY, OPS

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "_cuda.so"
_BUILD = (
    "build them where nvcc and a CUDA build of torch are installed: "
    "`pip install --no-deps nvidia-cutlass==4.2.0.0`, then "
    "`QUAMBA_BUILD_CUDA=1 pip install --no-build-isolation -e .` in the source tree (csrc/README.md)"
)


def unavailable(name: str, reason: str) -> Callable[..., NoReturn]:
    """What stands in for an op on CUDA tensors while the kernels are not there: it raises KernelError."""

    def raise_error(*args: Any) -> NoReturn:
        raise KernelError(
            f"found CUDA tensors in quamba::{name}, but {reason}; {_BUILD}, "
            "or run inside `with quamba.ops.reference():` for the slow plain PyTorch meaning"
        )

    return raise_error


def load(path: Path = LIBRARY_PATH) -> str | None:
    """Register the CUDA kernels, or the errors in their place.

    Args:
        path: the library.

    Returns:
        None where the kernels are there, else why they are not.
    """
    reason = None
    if torch.version.cuda is None:
        reason = f"this torch ({torch.__version__}) is built without CUDA"
    elif not path.exists():
        reason = f"quamba was installed without its CUDA kernels (no {path})"
    else:
        try:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except OSError as error:
            reason = f"the CUDA kernels could not be loaded ({error})"
    if reason is not None:
        for name in (op.name for op in OPS.values() if not op.has_cuda):
            LIBRARY.impl(name, unavailable(name, reason), "CUDA")  # type: ignore[no-untyped-call]
    return reason


MISSING = load()
