"""What a figure was measured on: the model's tensors, the files, the versions, the machine, the date."""

import hashlib
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "lm_eval", "accelerate")


def model_sha256(model: nn.Module) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every tensor in the model's state, in order of names.

    Two models with one hash give the same results, wherever they were loaded from. It depends on the dtype that the
    model was loaded in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python, of quamba, and of what is installed of the packages that results depend on."""
    from quamba import __version__

    found = {"python": platform.python_version(), "quamba": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device | str) -> str:
    """The name of the GPU, or of the CPU with its number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def now() -> str:
    """The time in UTC, to the second, in ISO form."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
