"""The paper's tables beside what is measured here, for any of its models and tasks.

    python examples/reproduce_paper.py --model 130m=state-spaces/mamba-130m-hf --calib CALIBRATION.txt --device cuda

Accuracy: the paper's figures are averages of the zero-shot accuracies in six tasks. A measured average stands beside
them only where all six tasks were measured, on all their documents; where they were not, the place stays empty. A task
may be one of lm-eval's, which needs the hub, or a template with a local file (docs/evaluation.md).

Latency and size, on a GPU or with `--tables latency`: TTFT, TPOT and TTLT over prompt and output lengths, as in the
paper's tables. Theirs are of other devices, so that only ratios compare; of these we have the abstract's. A time that
would take too long to measure is not computed but left out.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from quamba.bench import Report
from quamba.bench import measure as time_models
from quamba.bench.building import quantize_blindly
from quamba.bench.peer import make_peer
from quamba.bench.profile import caption, profile
from quamba.bench.subjects import Quantized, Subject
from quamba.bench.timing import Plan as Timing
from quamba.checkpoint.sizes import checkpoint_dtype
from quamba.eval import LocalTask, parse_task
from quamba.eval.comparing import run_trials
from quamba.eval.provenance import hardware, model_sha256, now, versions
from quamba.eval.state import StateFile
from quamba.eval.trials import Plan, Trial
from quamba.recipes import RECIPES
from quamba.text import TextPart

# Quamba (Chiang et al., arXiv 2410.13229): average accuracy in percent, by recipe, of the paper's models.
PAPER: Mapping[str, Mapping[str, float]] = {
    "float": {"130m": 44.7, "370m": 51.7, "1.4b": 59.7, "2.8b": 63.1},
    "naive": {"2.8b": 45.9},
    "clip": {"2.8b": 48.5},
    "hadamard": {"2.8b": 56.4},
    "smoothquant": {"2.8b": 57.3},
    "mamba-had": {"130m": 42.6, "370m": 50.0, "1.4b": 58.1, "2.8b": 62.4},
    "quamba": {"130m": 43.5, "370m": 49.0, "1.4b": 58.4, "2.8b": 62.2},
    "quamba-o": {"130m": 42.9, "370m": 50.4, "1.4b": 58.4, "2.8b": 62.5},
}
# What the average is over, and the names that count as each.
TASKS: Mapping[str, tuple[str, ...]] = {
    "LAMBADA": ("lambada_openai", "lambada"),
    "HellaSwag": ("hellaswag",),
    "PIQA": ("piqa",),
    "ARC-e": ("arc_easy",),
    "ARC-c": ("arc_challenge",),
    "WinoGrande": ("winogrande",),
}
EMPTY = "—"
TABLES = ("accuracy", "latency")
# The abstract: how much less time generation takes than in float16, by model and recipe, on an Orin Nano 8G.
FASTER: Mapping[str, Mapping[str, float]] = {"2.8b": {"quamba": 1.72}}


def accuracy(trial: Trial, task: str) -> float | None:
    """What a trial measured in one of TASKS, in percent; None where it measured nothing."""
    found = [trial.tasks[name] for name in TASKS[task] if name in trial.tasks]
    return 100 * found[0].metrics[found[0].headline].value if found else None


def average(trial: Trial, *, limited: bool) -> float | None:
    """Over the six tasks; None unless all of them were measured, on all documents."""
    values = [accuracy(trial, task) for task in TASKS]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(TASKS) and not limited else None


def rows_of(size: str, trials: Sequence[Trial], *, limited: bool) -> list[list[str]]:
    """One for each recipe: the paper's average, the measured one, the measured tasks."""

    def cell(value: float | None) -> str:
        return EMPTY if value is None else f"{value:.1f}"

    return [
        [
            size,
            trial.name,
            cell(PAPER.get(trial.name, {}).get(size)),
            cell(average(trial, limited=limited)),
            *(cell(accuracy(trial, task)) for task in TASKS),
        ]
        for trial in trials
    ]


def measure(
    source: str, tasks: Sequence[str | LocalTask], *, args: argparse.Namespace, state: Path
) -> tuple[list[Trial], str]:
    """The trials of one model, those of an earlier run taken from the state file, and the hardware."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype).to(args.device).eval()

    plan = Plan(
        recipes=tuple(RECIPES[name] for name in args.recipes.split(",")),
        calibrations=() if args.calib is None else (TextPart.parse(args.calib),),
        tasks=tuple(tasks),
        samples=args.samples,
        seq_len=args.length,
        limit=args.limit,
    )
    first = load()
    identity = {"model_sha256": model_sha256(first), "versions": versions(), **plan.identity()}
    kept = StateFile(state, identity, recipes=plan.recipes, restart=args.restart)
    trials = run_trials(plan, load, AutoTokenizer.from_pretrained(source), done=kept.trials, keep=kept.add)
    return trials, hardware(first.device)


def latencies(source: str, *, args: argparse.Namespace) -> Report:
    """What was measured of one model's recipes, float first, in turn; computed times are left out."""
    subjects: list[Subject] = []
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    for name in dict.fromkeys(("float", *args.recipes.split(","))):
        if RECIPES[name].simulated:
            continue
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
        stored = checkpoint_dtype(model)
        subjects.append(Quantized(name, quantize_blindly(model, name), dtype=stored))
    if args.against is not None:
        subjects.append(make_peer(args.against, model, dtype=dtype, device=device))
    report = time_models(
        model=source, dtype=dtype, subjects=subjects, reference=args.against or "float", batches=[1],
        lengths=numbers(args.prompts), new_tokens=numbers(args.output), plan=Timing(seconds=args.seconds), kernels=0,
    )  # fmt: skip
    return replace(report, figures=tuple(figure for figure in report.figures if figure.measured))


def latency_rows(size: str, report: Report) -> list[list[str]]:
    """The profile, a row of the paper's ratios above it."""
    heading, *rows = profile(report)
    paper = FASTER.get(size, {})
    ratios = [f"{paper[name]:.2f}x" if name in paper else EMPTY for name in heading[1:]]
    return [heading, ["paper: generation, Orin Nano 8G", *ratios], *rows]


def numbers(text: str) -> list[int]:
    """Those between the commas."""
    return [int(part) for part in text.split(",") if part]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="SIZE=NAME", help="such as 130m=FOLDER")
    parser.add_argument("--task", action="append", help="by default the six of the paper, by lm-eval's names")
    parser.add_argument("--recipes", default=",".join(name for name in PAPER if name != "float"))
    parser.add_argument("--calib", metavar="[NAME=]FILE[:FIRST:LAST]")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, help="documents of each task; then no average is shown")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--state", type=Path, default=Path("build"), help="folder for results as they come")
    parser.add_argument("--restart", action="store_true")
    default = ",".join(TABLES) if torch.cuda.is_available() else TABLES[0]
    parser.add_argument("--tables", default=default, help="accuracy, latency, or both; by default both on a GPU")
    parser.add_argument("--prompts", default="512,1024,2048", help="tokens, for TTFT and TTLT")
    parser.add_argument("--output", default="128,512", help="new tokens, for TTLT")
    parser.add_argument("--against", help="time this too, and compare with it: mamba-ssm, the paper's float model")
    parser.add_argument("--seconds", type=float, default=30.0, help="at most, for one time of one recipe")
    args = parser.parse_args(arguments)
    wanted = args.tables.split(",")
    if not set(wanted) <= set(TABLES):
        parser.error(f"found --tables {args.tables!r}; expected {' or '.join(TABLES)}, or both")
    models = [entry.partition("=")[::2] for entry in args.model]
    for entry, (_, source) in zip(args.model, models, strict=True):
        if not source:
            parser.error(f"found --model {entry!r}; expected SIZE=NAME, such as 130m=state-spaces/mamba-130m-hf")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    if "accuracy" in wanted:
        tasks = [parse_task(task) for task in args.task or [names[0] for names in TASKS.values()]]
        table = Table("model", "recipe", "paper, average", "here, average", *TASKS, title="Zero-shot accuracy, percent")
        where = ""
        for size, source in models:
            trials, where = measure(source, tasks, args=args, state=args.state / f"paper-{size}.json")
            for row in rows_of(size, trials, limited=args.limit is not None):
                table.add_row(*row)
        console.print(table)
        console.print(f"measured {now()} on {where}; {EMPTY}: not measured here, or not in the paper's table")
    for size, source in models if "latency" in wanted else ():
        report = latencies(source, args=args)
        heading, *rows = latency_rows(size, report)
        table = Table(*heading, title=f"Latency and size of {size}")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in caption(report):
            console.print(line, markup=False)
        console.print(f"{EMPTY}: not measured here, or not known from the paper")


if __name__ == "__main__":
    main()
