"""Builds the native CPU ops into quamba/_cpu, where there is a C++ compiler; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("csrc")


def cpu_extension() -> list[Extension]:
    """The native CPU ops: plain C++17 against Python's stable ABI. Without a compiler the torch ones serve."""
    if sys.platform == "win32":  # the kernels are written in the vector types of GCC and Clang
        return []
    folder = CSRC / "cpu"
    return [
        Extension(
            "quamba._cpu",
            sources=[str(path) for path in sorted(folder.glob("*.cpp"))],
            depends=[str(path) for path in sorted(folder.rglob("*.h"))],
            include_dirs=[str(folder), str(folder / "include")],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"],
            py_limited_api=True,
            optional=True,
        )
    ]


setup(ext_modules=cpu_extension())
