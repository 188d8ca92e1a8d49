"""The build's own modules, which are not part of the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def module(name: str) -> ModuleType:
    path = CSRC / f"{name}.py"
    if not path.exists():
        pytest.skip(f"no {path}: the sources of the CUDA ops are not here", allow_module_level=True)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded
