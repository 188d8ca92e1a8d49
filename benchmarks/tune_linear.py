"""Times every kernel of linear over the shapes of known models and writes the table that the build reads:
`python benchmarks/tune_linear.py [--write] [--times FILE] [--from FILE] [--only REGEX]`.

For each weight (N, K) of a model and each number of rows M, every kernel that takes the shape runs in a CUDA graph over
inputs that leave the L2 cache. The table names the fastest; between neighbours in M it changes only where that gains
more than a percent. Other shapes go by the model in csrc/linear_choice.cu, whose loss on these is printed.
`--write` replaces csrc/linear_table.json, with `--only` the weights that were timed alone; build again for it to take
effect. `--from` chooses anew from the times of an earlier run, without a GPU.
"""

import argparse
import json
import os
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from ops_cuda import half, int8, scale, time_graph

from quamba import ops

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "linear_table.json"
FEW = ("dot", "rows4", "rows8", "rows16")  # kernels for few rows of x
# Rows of x that the ring is offered for. With fewer it is faster by itself, but not among a step's other launches: its
# clusters start late (mamba-2.8b, 16 sequences: 2.99 ms a token with the ring for W_x, 2.78 without).
RING_ROWS = range(33, 4097)
SLICES_ROWS = range(33, 4097)  # that the one by slices of K is offered for, and columns at most
SLICES_COLUMNS = 512
SHORT_INNER = 256  # that the kernels for short rows take, for int8 results
STRIPS_ROWS = range(64, 4097)  # that the one by strips is offered for
TILES = ("128x256", "128x192", "128x128", "64x64")
WIDE_TILES = {"128x160": 256}  # and the rows of x from which on each is offered
# For int8 results alone, and their rows of x; then for float32 with a residual.
INT8_TILES = {"64x80": range(16, 257), "256x192": range(512, 4097), "pairs": range(128, 4097)}
RESIDUAL_TILES = {name: range(128, 4097) for name in ("128x80", "128x96", "pairs", "halves", "quads")}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MARGIN = 0.01
CACHE_BYTES = 128 << 20
POOL_BYTES = 512 << 20

# E, D, R and the vocabulary: mamba-130m to 2.8b, falcon-mamba-7b, jamba.
MODELS = (
    (768, 1536, 48, 50280),
    (1024, 2048, 64, 50280),
    (1536, 3072, 96, 50280),
    (2048, 4096, 128, 50280),
    (2560, 5120, 160, 50280),
    (4096, 8192, 256, 65024),
    (4096, 8192, 256, 65536),
)
STATES = 16


@dataclass(frozen=True)
class Weight:
    """A weight (columns, inner) of a model, and what the model makes of the product."""

    columns: int
    inner: int
    quantized: bool  # int8 out, else float16, or float32 with a residual
    residual: bool  # float32, as models keep their residual stream
    most_rows: int


def weights() -> list[Weight]:
    """W_in, W_x, W_dt, W_out and the head of every model, each shape once."""
    found = {}
    for width, inner, rank, vocabulary in MODELS:
        for weight in (
            Weight(2 * inner, width, True, False, ROWS[-1]),
            Weight(rank + 2 * STATES, inner, True, False, ROWS[-1]),
            Weight(inner, rank, True, False, ROWS[-1]),
            Weight(width, inner, False, True, ROWS[-1]),
            Weight(vocabulary, width, False, False, 512),
        ):
            found.setdefault((weight.columns, weight.inner), weight)
    return list(found.values())


def kernels(weight: Weight, rows: int) -> list[str]:
    """Those that take this many rows of x for a weight."""
    few = [name for name in FEW if rows <= (1 if name == "dot" else 32)]
    ring = ["ring"] if rows in RING_ROWS else []
    short = ["short"] if weight.quantized and weight.inner <= SHORT_INNER and rows >= 8 else []
    strips = ["strips"] if short and rows in STRIPS_ROWS and weight.columns % 64 == 0 else []
    slices = weight.columns <= SLICES_COLUMNS and weight.inner > SHORT_INNER and rows in SLICES_ROWS
    tiles = [name for name in TILES if rows >= 16]
    tiles += [name for name, least in WIDE_TILES.items() if rows >= least]
    if weight.quantized:
        tiles += [name for name, offered in INT8_TILES.items() if rows in offered]
    if weight.residual:
        tiles += [name for name, offered in RESIDUAL_TILES.items() if rows in offered]
    return few + ring + short + strips + (["slices"] if slices else []) + tiles


def choices(times: dict[int, dict[str, float]], margin: float = MARGIN) -> list[tuple[int, str]]:
    """(rows at most, kernel), ascending: the fastest, or the one for fewer rows where it loses less than the margin."""
    result: list[tuple[int, str]] = []
    for rows in sorted(times):
        best = min(times[rows], key=lambda name: times[rows][name])
        before = result[-1][1] if result else None
        if before in times[rows] and times[rows][before] <= times[rows][best] * (1 + margin):
            result[-1] = (rows, before)
        else:
            result.append((rows, best))
    return result


def inputs(weight: Weight, rows: int, pool: torch.Tensor) -> list[tuple]:
    """Sets of arguments; the weights lie in the pool, one after the other."""
    n, k = weight.columns, weight.inner
    out_bytes = rows * n * (1 if weight.quantized else 8 if weight.residual else 2)
    count = min(max(2, CACHE_BYTES // (n * k + rows * k + out_bytes)), 100)
    dtype = torch.int8 if weight.quantized else torch.float32 if weight.residual else torch.float16
    scales = scale(), scale(n), scale(n) * 300 if weight.quantized else None
    x = int8(rows, k)
    residual = half(rows, n).float() if weight.residual else None
    sets = []
    for i in range(count):
        start = i * n * k % (pool.numel() - n * k) // 256 * 256
        matrix = pool[start : start + n * k].view(n, k)
        sets.append((x, scales[0], matrix, scales[1], None, residual, scales[2], dtype))
    return sets


def measure(weight: Weight, rows: int, pool: torch.Tensor) -> dict[str, float]:
    """Microseconds of a call by kernel; "model" is what the model chooses."""
    sets, times = inputs(weight, rows, pool), {}
    for name in ("model", *kernels(weight, rows)):
        os.environ["QUAMBA_LINEAR_KERNEL"] = name
        times[name] = round(time_graph(ops.linear, sets, replays=4, calls=1)[0], 2)
    del os.environ["QUAMBA_LINEAR_KERNEL"]
    return times


def earlier(path: str) -> tuple[str, dict[tuple[int, int], Any]]:
    """What `--times` wrote: where it was measured, and the times by weight."""
    found = json.loads(Path(path).read_text())
    return found["measured"], {(entry["columns"], entry["inner"]): entry for entry in found["weights"]}


def write(measured: str, shapes: list[dict[str, Any]]) -> None:
    """Puts the choices for these weights into the table: in place of its own, or behind them."""
    table = json.loads(TABLE.read_text())
    found = {(shape["columns"], shape["inner"]): shape for shape in [*table["shapes"], *shapes]}
    lines = ",\n".join(f"    {json.dumps(shape)}" for shape in found.values())
    beside = TABLE.with_suffix(".part")
    beside.write_text(f'{{\n  "measured": {json.dumps(measured)},\n  "shapes": [\n{lines}\n  ]\n}}\n')
    beside.replace(TABLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")
    parser.add_argument("--times", help="write every time there, as JSON")
    parser.add_argument("--from", dest="source", help="choose from the times in this file instead of measuring")
    parser.add_argument("--only", default="", help="weights whose NxK this expression finds")
    arguments = parser.parse_args()
    if arguments.source:
        measured, kept = earlier(arguments.source)
    else:
        measured, kept = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {date.today()}", {}
        pool = int8(POOL_BYTES)
    shapes, everything, loss = [], [], []
    for weight in weights():
        if not re.search(arguments.only, f"{weight.columns}x{weight.inner}"):
            continue
        if arguments.source:
            entry = kept[weight.columns, weight.inner]
            modelled = {int(rows): time for rows, time in entry["model"].items()}
            times = {
                rows: {name: entry["times"][str(rows)][name] for name in kernels(weight, rows)} for rows in modelled
            }
        else:
            times = {rows: measure(weight, rows, pool) for rows in ROWS if rows <= weight.most_rows}
            modelled = {rows: row.pop("model") for rows, row in times.items()}
        loss += [modelled[rows] / min(row.values()) - 1 for rows, row in times.items()]
        chosen = choices(times)
        shapes.append({"columns": weight.columns, "inner": weight.inner, "choices": chosen})
        everything.append({"columns": weight.columns, "inner": weight.inner, "model": modelled, "times": times})
        print(f"{weight.columns}x{weight.inner}: {', '.join(f'<= {rows} {name}' for rows, name in chosen)}", flush=True)
        if arguments.times:
            Path(arguments.times).write_text(json.dumps({"measured": measured, "weights": everything}))
    print(f"the model loses {sum(loss) / len(loss):.1%} to the fastest in the mean, {max(loss):.0%} at most")
    if arguments.write:
        write(measured, shapes)


if __name__ == "__main__":
    main()
