"""Checks a built library: `python csrc/resources.py quamba/_cuda.so [--registers]`.

Compares the local memory of every kernel, where spilled registers and arrays that are indexed at run time live, with
resources.json; a kernel that is missing there, or here, is an error as well. Then that the library needs nothing of
torch but its stable C interface. Needs cuobjdump (of the CUDA toolkit, or of the package nvidia-cuda-cuobjdump) and nm.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path

TABLE = Path(__file__).with_name("resources.json")
TORCH_ABI = re.compile(r"(aoti_torch|torch)_\w+$")


@dataclass(frozen=True)
class Kernel:
    """A kernel of the library, compiled for one architecture ("sm_80")."""

    arch: str
    name: str  # mangled
    registers: int
    local: int  # bytes a thread


@dataclass(frozen=True)
class Family:
    """The kernels whose mangled name an expression finds, and what they may use. The first that matches counts."""

    name: str
    local: int = 0  # bytes a thread, at most
    only: str = ""  # the architectures it is for, as an expression; "": all
    why: str = ""  # the local memory is tolerated

    def belongs(self, arch: str) -> bool:
        return self.only == "" or re.fullmatch(self.only, arch) is not None


def families(text: str) -> list[Family]:
    """The table; raises TypeError for an unknown entry."""
    return [Family(**entry) for entry in json.loads(text)]


def kernels(usage: str) -> list[Kernel]:
    """What `cuobjdump --dump-resource-usage` printed, as kernels."""
    result, arch, name = [], "", ""
    for line in usage.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif line.startswith(" Function "):
            name = line.removeprefix(" Function ").strip().rstrip(":")
        elif name and (found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line)):
            registers, stack, local = map(int, found.groups())
            result.append(Kernel(arch, name, registers, stack + local))
            name = ""
    return result


def problems(found: list[Kernel], table: list[Family]) -> list[str]:
    """One line for each kernel over its bound or not in the table, and each family that the library lacks."""
    lines = [] if found else ["the library has no kernels"]
    present = set()
    for kernel in found:
        family = next((f for f in table if f.belongs(kernel.arch) and re.search(f.name, kernel.name)), None)
        if family is None:
            lines.append(f"{kernel.arch} {kernel.name}: not in {TABLE.name}; add its family")
            continue
        present.add((kernel.arch, family.name))
        if kernel.local > family.local:
            lines.append(
                f"{kernel.arch} {kernel.name}: {kernel.local} bytes of local memory at {kernel.registers} registers; "
                f"{family.name!r} allows {family.local}"
            )
    for arch in sorted({kernel.arch for kernel in found}):
        for family in table:
            if family.belongs(arch) and (arch, family.name) not in present:
                lines.append(f"{arch}: no kernel of the family {family.name!r} in the library")
    return lines


def foreign(symbols: str) -> list[str]:
    """The undefined symbols, by `nm -D --undefined-only`, that neither the system nor torch's C interface defines.

    What the system's libraries define carries a version, but for a few of the C++ library's templates.
    """
    names = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2:-1] == ["U"]]
    return [name for name in names if "@" not in name and not TORCH_ABI.match(name) and not name.startswith("_ZNSt")]


def cuobjdump() -> str | None:
    """The program's path: in CUDA_HOME, on PATH, or in the package nvidia-cuda-cuobjdump."""
    if "CUDA_HOME" in os.environ and (path := shutil.which(Path(os.environ["CUDA_HOME"]) / "bin" / "cuobjdump")):
        return str(path)
    if path := shutil.which("cuobjdump"):
        return path
    spec = util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((str(p) for folder in folders for p in sorted(Path(folder).glob("*/bin/cuobjdump"))), None)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--registers", action="store_true", help="print every kernel's registers and local memory")
    arguments = parser.parse_args()
    if not arguments.library.is_file():
        sys.exit(f"{arguments.library} is not there; build it first (csrc/README.md)")
    program = cuobjdump()
    if program is None:
        sys.exit("cuobjdump is not found; pip install nvidia-cuda-cuobjdump, or set CUDA_HOME to a toolkit that has it")
    found = kernels(output(program, "--dump-resource-usage", str(arguments.library)))
    if arguments.registers:
        for kernel in found:
            print(f"{kernel.arch:8s}{kernel.registers:4d} registers {kernel.local:4d} bytes  {kernel.name}")
    lines = problems(found, families(TABLE.read_text()))
    for symbol in foreign(output("nm", "-D", "--undefined-only", str(arguments.library))):
        lines.append(f"needs the symbol {symbol}, which is not of torch's stable interface")
    for line in lines:
        print(line, file=sys.stderr)
    archs = ", ".join(sorted({kernel.arch for kernel in found}))
    print(f"{arguments.library}: {len(found)} kernels for {archs}; {len(lines)} problems")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
