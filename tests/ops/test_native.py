"""The native library's loader: on and off, its packing, and what it says of itself."""

import importlib
import os
import struct
import subprocess
import sys

import pytest
import torch

from quamba.ops import native

needs_library = pytest.mark.skipif(not native.available(), reason="the native library is not built")


@needs_library
def test_disabled_inside_the_context_only(implementation: str) -> None:
    if implementation == "torch":
        pytest.skip("already off")
    with native.disabled():
        assert native.library() is None
        assert not native.available()
        assert native.description().startswith("torch (")
        with native.disabled():
            assert not native.available()
        assert not native.available()
    assert native.available()
    assert native.description() == f"native ({native.library().isa()})"


def test_the_environment_turns_it_off() -> None:
    code = "from quamba.ops import native; print(native.available(), native.description())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QUAMBA_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False torch (QUAMBA_NATIVE=0)"


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.delenv("QUAMBA_NATIVE", raising=False)
    monkeypatch.setattr(importlib, "import_module", fail)
    library, reason = native._load()
    assert library is None
    assert "quamba._cpu" in reason
    assert "compiler" in reason


@needs_library
def test_packing_follows_the_library(implementation: str) -> None:
    if implementation == "torch":
        pytest.skip("needs the library")
    x, weight = torch.zeros(3, 4), torch.ones(4)
    scale, out = torch.tensor(0.5), torch.zeros(3, 4, dtype=torch.int8)
    values = {"rows": 3, "size": 4, "threads": 1, "x": x, "x_stride": 4, "weight": weight, "eps": 0.25}
    packed = native.pack("rms_norm_quant", **values, scale=scale, out=out)
    expected = [3, 4, 1, x.data_ptr(), 4, weight.data_ptr(), 0.25, scale.data_ptr(), 0, out.data_ptr()]
    assert packed == struct.pack("@qqqPqPdPqP", *expected)
    packed = native.pack("rms_norm_quant", **{**values, "weight": None}, scale=weight, out=out)
    assert packed == struct.pack("@qqqPqPdPqP", *expected[:5], 0, 0.25, weight.data_ptr(), 1, out.data_ptr())
    with pytest.raises(TypeError, match="rms_norm_quant"):
        native.pack("rms_norm_quant", **values)


@needs_library
def test_bad_calls_raise(implementation: str) -> None:
    if implementation == "torch":
        pytest.skip("needs the library")
    library = native.library()
    with pytest.raises(ValueError, match="bytes"):
        library.linear(b"short")
    with pytest.raises(TypeError):
        library.linear("not bytes")
    with pytest.raises(TypeError, match="arguments"):
        library.mixer_step(b"")
    with pytest.raises(ValueError, match="instruction set"):
        library.select("none such")
    with pytest.raises(ValueError, match="length"):
        library.unchanged((1,), (1, 2), (None,), (None,))


@needs_library
def test_unchanged(implementation: str) -> None:
    if implementation == "torch":
        pytest.skip("needs the library")
    unchanged = native.library().unchanged
    tensor, other = torch.zeros(3), torch.zeros(3)

    def state(value: object) -> tuple[object, object]:
        return (value.data_ptr(), value._version) if isinstance(value, torch.Tensor) else (None, None)

    def check(stored: tuple[object, ...], *values: object) -> bool:
        pointers, versions = zip(*(state(value) for value in stored), strict=True)
        return bool(unchanged(values, stored, pointers, versions))

    stored = (tensor, None, 0.5, True, torch.float32)
    assert check(stored, tensor, None, 0.25 + 0.25, True, torch.float32)
    assert not check(stored, other, None, 0.5, True, torch.float32)
    assert not check(stored, tensor, other, 0.5, True, torch.float32)
    assert not check(stored, None, None, 0.5, True, torch.float32)
    assert not check(stored, tensor, None, 0.6, True, torch.float32)
    assert not check(stored, tensor, None, 0.5, False, torch.float32)
    assert not check(stored, tensor, None, 0.5, True, torch.float16)
    assert not check(stored, tensor, 0.0, 0.5, True, torch.float32)
    before = state(tensor)
    tensor.add_(1)
    assert not unchanged((tensor,), (tensor,), (before[0],), (before[1],))
    before = state(tensor)
    tensor.data = other.clone()
    assert not unchanged((tensor,), (tensor,), (before[0],), (tensor._version,))
