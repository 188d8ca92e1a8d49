"""Builds the compiled ops; everything else is in pyproject.toml.

quamba/_cpu, the native CPU ops, needs a C++ compiler alone and is left out where there is none; quamba/_cuda.so, the
CUDA ops, is built where that is asked for.

Environment (csrc/README.md explains): QUAMBA_BUILD_CUDA = auto | 1 | 0, QUAMBA_CUDA_ARCHS, QUAMBA_BUILD_JOBS.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
sys.path.insert(0, str(CSRC))

from architectures import DEFAULT, HOPPER, gencode, parse  # noqa: E402

TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch that the library loads under

# An assertion is a function call, and wgmma instructions that a call might interrupt are serialized: half the speed.
NO_ASSERTS = ("-DNDEBUG",)
# CUTLASS's kernels for Hopper wait for the kernel before them, and let the next one start, only with this.
EARLY = ("-DCUTLASS_ENABLE_GDC_FOR_SM90",)
EXTENDED = ("-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",)  # matrix instructions of 80 and 160 columns
GENERATED = {"hadamard_bases": ROOT / "quamba" / "hadamard.py", "linear_table": CSRC / "linear_table.json"}  # from what
TYPES = {"int8": "int8_t", "half": "__half", "bfloat16": "__nv_bfloat16", "float": "float"}


@dataclass(frozen=True)
class Unit:
    """One translation unit: a source, compiled with definitions, for all architectures or for some."""

    source: str
    name: str
    defines: tuple[str, ...] = ()
    only: str = ""  # "90a": Hopper alone; "80": Ampere and, through PTX, all later ones; "": every architecture


def units() -> list[Unit]:
    plain = [
        "block",
        "causal_conv1d",
        "embedding",
        "hadamard_quant",
        "linear",
        "linear_choice",
        "linear_conv1d_step",
        "linear_matrix",
        "blocks_prefill",
        "quantize",
        "rms_norm_quant",
        "selective_scan",
        "shared_memory",
    ]
    result = [Unit(f"{name}.cu", name) for name in plain]
    for lanes, states in ((4, 4), (8, 2), (16, 4)):
        defines = (f"-DQUAMBA_LANES={lanes}", f"-DQUAMBA_STATES={states}")
        result.append(Unit("selective_scan_kernel.cu", f"selective_scan_{lanes}_{states}", defines))
    for lanes in (16, 32):
        defines = (f"-DQUAMBA_LANES={lanes}",)
        result.append(Unit("selective_scan_chunks.cu", f"selective_scan_chunks_{lanes}", defines))
    for groups in (1, 2, 3, 4, 5):
        defines = (f"-DQUAMBA_GROUPS={groups}", "-DQUAMBA_BLOCKS=1")
        result.append(Unit("selective_scan_relay.cu", f"selective_scan_relay_{groups}", defines))
    paired = ("-DQUAMBA_GROUPS=3", "-DQUAMBA_BLOCKS=2")  # two blocks that share their memory: Hopper's
    result.append(Unit("selective_scan_relay.cu", "selective_scan_relay_3_2", paired, only="90a"))
    for groups in (3, 4, 5):
        halves = (f"-DQUAMBA_GROUPS={groups}",)
        result.append(Unit("selective_scan_halves.cu", f"selective_scan_halves_{groups}", halves, only="90a"))
    for base in (0, 1, 12, 20, 28, 36, 44, 52, 60):
        result.append(Unit("hadamard_quant_kernel.cu", f"hadamard_quant_{base}", (f"-DQUAMBA_BASE={base}",)))
    # Needs the asynchronous copies of Hopper; elsewhere a step takes the single ops.
    result.append(Unit("mixers_step.cu", "mixers_step", only="90a"))
    for name in ("blocks_step", "blocks_step_many"):
        result.append(Unit(f"{name}.cu", name, only="90a"))
    for base in (0, 1, 12, 20):
        for kernel in ("mixers_step", "mixers_step_many"):
            result.append(Unit(f"{kernel}_kernel.cu", f"{kernel}_{base}", (f"-DQUAMBA_BASE={base}",), only="90a"))
    result.append(Unit("linear_sm80.cu", "linear_sm80", NO_ASSERTS, only="80"))
    for name, cpp in TYPES.items():
        for residual in (0, 1):
            if residual and name == "int8":
                continue
            tiles = ["k128x128", "k64x64"]
            if residual or name != "float":
                tiles += ["k128x256", "k128x192", "k128x160"]
            if name == "int8":
                tiles += ["k64x80", "k256x192"]
            if residual and name == "float":
                tiles += ["k128x80", "k128x96"]
            for tile in tiles:
                flags = (*NO_ASSERTS, *EARLY, *(EXTENDED if tile.endswith(("80", "160")) else ()))
                defines = (f"-DQUAMBA_OUT={cpp}", f"-DQUAMBA_RESIDUAL={residual}", f"-DQUAMBA_TILE={tile}")
                unit = f"linear_sm90_{name}_{residual}_{tile}"
                result.append(Unit("linear_sm90.cu", unit, (*flags, *defines), only="90a"))
    for name in ("linear_held", "linear_slices", "linear_strips"):
        result.append(Unit(f"{name}.cu", name, (*NO_ASSERTS, *EXTENDED), only="90a"))
    for name in ("int8", "float"):
        flags = (*NO_ASSERTS, *EXTENDED, f"-DQUAMBA_OUT={TYPES[name]}")
        result.append(Unit("linear_pairs.cu", f"linear_pairs_{name}", flags, only="90a"))
    result.append(Unit("linear_short.cu", "linear_short", only="90a"))
    result.append(Unit("selective_scan_step_bulk.cu", "selective_scan_step_bulk", only="90a"))
    for name in ("linear_ring", "linear_conv1d_step_kernel"):  # where blocks of a cluster can add up
        result.append(Unit(f"{name}.cu", name, only="90a"))
    return result


def cutlass_include() -> Path | None:
    """The CUTLASS headers: CUTLASS_PATH, or the package nvidia-cutlass."""
    candidates = [Path(os.environ["CUTLASS_PATH"]) / "include"] if "CUTLASS_PATH" in os.environ else []
    if (spec := util.find_spec("cutlass_library")) and spec.submodule_search_locations:
        candidates.append(Path(next(iter(spec.submodule_search_locations))) / "source" / "include")
    return next((path for path in candidates if (path / "cutlass" / "cutlass.h").exists()), None)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


def missing() -> list[str]:
    """What a CUDA build needs and this environment lacks."""
    found = {
        "nvcc (on PATH or in CUDA_HOME)": nvcc(),
        "torch >= 2.11 (pip install --no-build-isolation)": util.find_spec("torch"),
        "the CUTLASS headers (pip install --no-deps nvidia-cutlass==4.2.0.0, or CUTLASS_PATH)": cutlass_include(),
    }
    return [what for what, where in found.items() if where is None]


def wanted() -> bool:
    """Whether to build, by QUAMBA_BUILD_CUDA; says why where it does not."""
    mode = os.environ.get("QUAMBA_BUILD_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"QUAMBA_BUILD_CUDA is {mode!r}; expected auto, 1 or 0")
    if mode == "0":
        return False
    lacking = missing()
    if mode == "1":
        if lacking:
            raise SystemExit("QUAMBA_BUILD_CUDA=1, but the build lacks " + "; ".join(lacking))
        return True
    if not lacking:
        import torch

        if torch.version.cuda is not None:
            return True
        lacking = ["a torch built with CUDA"]
    print(f"quamba: installing without the CUDA ops; missing: {'; '.join(lacking)}", file=sys.stderr)
    return False


def stale(target: Path, command: list[str]) -> bool:
    """Whether an object has to be compiled: never was, was otherwise, or one of its sources is newer."""
    depfile, recorded = target.with_suffix(".d"), target.with_suffix(".command")
    if not (target.exists() and depfile.exists() and recorded.exists()):
        return True
    if recorded.read_text() != "\n".join(command):
        return True
    sources = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    built = target.stat().st_mtime
    return any(not Path(source).exists() or Path(source).stat().st_mtime > built for source in sources)


def cpu_extension() -> list[Extension]:
    """The native CPU ops: plain C++17 against Python's stable ABI. Without a compiler the torch ones serve."""
    if sys.platform == "win32":  # the kernels are written in the vector types of GCC and Clang
        return []
    folder = Path("csrc") / "cpu"
    return [
        Extension(
            "quamba._cpu",
            sources=[str(path) for path in sorted(folder.glob("*.cpp"))],
            depends=[str(path) for path in sorted(folder.rglob("*.h"))],
            include_dirs=[str(folder), str(folder / "include")],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,
        )
    ]


class BuildOps(build_ext):
    """Compiles quamba/_cuda.so with nvcc, several units at a time, and links it against torch's stable ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] != "_cuda":
            return str(super().get_ext_filename(fullname))
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "quamba._cuda":
            super().build_extension(ext)
            return
        import torch

        build = Path(self.build_temp).resolve() / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        for name, data in GENERATED.items():
            generated, script = build / f"{name}.h", CSRC / f"{name}.py"
            if not generated.exists() or generated.stat().st_mtime < max(f.stat().st_mtime for f in (data, script)):
                subprocess.run([sys.executable, str(script), str(generated)], check=True)

        try:
            archs = parse(os.environ.get("QUAMBA_CUDA_ARCHS", DEFAULT))
        except ValueError as error:
            raise SystemExit(str(error)) from None
        torch_root = Path(torch.__file__).parent
        flags = [
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-DUSE_CUDA",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            *(["-DQUAMBA_SM90"] if HOPPER in archs else []),
            f"-I{CSRC}",
            f"-I{CSRC / 'include'}",
            f"-I{build}",
            f"-I{torch_root / 'include'}",
            f"-I{cutlass_include()}",
        ]

        def compile_unit(unit: Unit) -> str:
            target = build / f"{unit.name}.o"
            command = [
                nvcc(),
                *flags,
                *gencode(archs, unit.only),
                *unit.defines,
                "-c",
                str(CSRC / unit.source),
            ]
            if self.force or stale(target, command):
                print(f"nvcc {unit.name}", flush=True)
                depfile = target.with_suffix(".d")
                subprocess.run([*command, "-MD", "-MF", str(depfile), "-o", f"{target}.part"], check=True)
                target.with_suffix(".command").write_text("\n".join(command))
                os.replace(f"{target}.part", target)
            return str(target)

        # The units of the matrix kernels take longest: they come first.
        chosen = sorted((u for u in units() if gencode(archs, u.only)), key=lambda unit: unit.only == "")
        jobs = int(os.environ.get("QUAMBA_BUILD_JOBS", "2"))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_unit, chosen))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [nvcc(), "-shared", "-cudart=static", *objects, "-o", f"{target}.part", f"-L{torch_root / 'lib'}"]
        link += ["-Xlinker=--wrap=cudaFuncSetAttribute"]  # csrc/shared_memory.cu
        link += ["-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run([str(part) for part in link], check=True)
        os.replace(f"{target}.part", target)


setup(
    ext_modules=cpu_extension() + ([Extension("quamba._cuda", sources=[])] if wanted() else []),
    cmdclass={"build_ext": BuildOps},
    # Neither library depends on the version of Python.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
