"""The CUDA library seen from a machine without it: the errors that stand in, and the table that it is built from."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quamba import hadamard
from quamba.errors import KernelError, QuambaError
from quamba.ops import cuda

GENERATOR = Path(__file__).resolve().parents[2] / "csrc" / "hadamard_bases.py"


def test_the_error_says_what_is_missing_and_how_to_build_it() -> None:
    with pytest.raises(KernelError, match=r"quamba::linear.*no kernels here.*QUAMBA_BUILD_CUDA=1.*csrc/README"):
        cuda.unavailable("linear", "no kernels here")(1, 2, 3)
    assert issubclass(KernelError, QuambaError)


def numbers(header: str, name: str) -> list[int]:
    body = header.split(f" {name}[] = {{")[1].split("}")[0]
    return [int(word.strip().rstrip("u"), 0) for word in body.split(",")]


@pytest.mark.skipif(not GENERATOR.exists(), reason="the sources of the CUDA ops are not part of an installed package")
def test_the_generated_bases_are_those_of_python(tmp_path: Path) -> None:
    path = tmp_path / "bases.h"
    subprocess.run([sys.executable, str(GENERATOR), str(path)], check=True)
    header = path.read_text()
    orders, offsets, rows = (numbers(header, name) for name in ("kOrders", "kOffsets", "kRows"))
    assert sorted(orders) == orders
    for size in (1536, 5120, 8192, 100, 7, 140 * 64):
        assert hadamard.decompose(size)[2] in orders
    for order, offset in zip(orders, offsets, strict=True):
        words = (order + 31) // 32
        table = np.array(rows[offset : offset + order * words], dtype=np.uint64).reshape(order, words)
        bits = np.concatenate([(table[:, [c // 32]] >> np.uint64(c % 32)) & np.uint64(1) for c in range(order)], axis=1)
        assert np.array_equal(1 - 2 * bits.astype(np.int64), hadamard.base_matrix(order).numpy().astype(np.int64))
