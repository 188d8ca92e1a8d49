"""The table of a comparison: what each recipe costs beside the float model, with intervals of the difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quamba.bench.load import MOST
from quamba.errors import QuambaError
from quamba.eval.latency import TPOT, TTFT
from quamba.eval.perplexity import Perplexity
from quamba.eval.results import TaskResult
from quamba.eval.statistics import Difference, paired_difference, relative_increase
from quamba.eval.trials import FLOAT, TextTrial, Trial

_BASE = "—"
_DISTURBED = "†"


@dataclass(frozen=True)
class TextLine:
    """On one text: the perplexity, its relative increase over float (0.01 for one percent), the divergence in nats."""

    perplexity: float
    increase: Difference | None
    kl: float | None
    kl_tokens: int


@dataclass(frozen=True)
class TaskLine:
    """In one task: the score, and the difference of the headline metric to float where it is an accuracy."""

    result: TaskResult
    difference: Difference | None


@dataclass(frozen=True)
class Line:
    """One recipe with one calibration; the differences are None for the baseline."""

    trial: Trial
    texts: dict[str, TextLine]
    tasks: dict[str, TaskLine]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the values of single windows and documents."""
        trial = self.trial
        return {
            "recipe": trial.name,
            "simulated": trial.simulated,
            "calibration": trial.calibration,
            "bytes": trial.bytes,
            "quantize_seconds": trial.seconds,
            "latency": None if trial.latency is None else trial.latency.to_dict(),
            "date": trial.date,
            "texts": {
                name: {
                    "perplexity": text.perplexity,
                    "tokens": sum(trial.texts[name].window_tokens),
                    "windows": len(trial.texts[name].window_tokens),
                    "increase": None if text.increase is None else text.increase.to_dict(),
                    "kl": text.kl,
                    "kl_tokens": text.kl_tokens,
                }
                for name, text in self.texts.items()
            },
            "tasks": {
                name: {
                    **task.result.to_dict(),
                    "difference": None if task.difference is None else task.difference.to_dict(),
                }
                for name, task in self.tasks.items()
            },
        }


def lines_of(trials: Sequence[Trial]) -> list[Line]:
    """Every trial beside the baseline, which has to be among them.

    Raises:
        QuambaError: there is no baseline.
    """
    baseline = next((trial for trial in trials if trial.name == FLOAT), None)
    if baseline is None:
        raise QuambaError(f"found no trial of recipe {FLOAT!r}; expected the baseline among them")
    return [_line(trial, baseline) for trial in trials]


def _line(trial: Trial, baseline: Trial) -> Line:
    own = trial is baseline
    return Line(
        trial=trial,
        texts={name: _text(text, None if own else baseline.texts[name]) for name, text in trial.texts.items()},
        tasks={name: _task(task, None if own else baseline.tasks[name]) for name, task in trial.tasks.items()},
    )


def _text(text: TextTrial, reference: TextTrial | None) -> TextLine:
    tokens = torch.tensor(text.window_tokens)
    found = Perplexity(window_nll=torch.tensor(text.window_nll, dtype=torch.float64), window_tokens=tokens)
    increase = None
    if reference is not None:
        difference = paired_difference(text.window_nll, reference.window_nll, weights=text.window_tokens)
        increase = relative_increase(difference)
    return TextLine(perplexity=found.perplexity, increase=increase, kl=text.kl, kl_tokens=text.kl_tokens)


def _task(result: TaskResult, reference: TaskResult | None) -> TaskLine:
    name = result.headline
    difference = None
    if reference is not None and name in result.per_document:
        difference = paired_difference(result.per_document[name], reference.per_document[name])
    return TaskLine(result=result, difference=difference)


def cells(lines: Sequence[Line]) -> list[list[str]]:
    """The table as text: a row of headings, then a row for each line."""
    first = lines[0]
    several = len({line.trial.calibration for line in lines} - {None}) > 1
    baseline = next(line.trial for line in lines if line.trial.name == FLOAT)
    timed = next((line.trial.latency for line in lines if line.trial.latency is not None), None)
    head = ["recipe", *(["calibration"] if several else []), "weights"]
    for name in first.texts:
        head += [f"{name}: perplexity", "increase [95 %]", "KL"]
    for name, task in first.tasks.items():
        accuracy = task.result.headline in task.result.per_document
        head += [f"{name}: {task.result.headline}", *(["points [95 %]"] if accuracy else [])]
    if timed is not None:
        prompts = f"{timed.prompt} tokens" if timed.batch == 1 else f"{timed.batch} x {timed.prompt} tokens"
        head += [f"{TTFT} ({prompts}), ms", f"{TPOT} (batch {timed.batch}), ms"]
    rows = [head]
    for line in lines:
        trial = line.trial
        row = [f"{trial.name} (simulation)" if trial.simulated else trial.name]
        row += [trial.calibration or _BASE] if several else []
        row += [_BASE if trial.simulated else _megabytes(trial.bytes)]
        for text in line.texts.values():
            row += [f"{text.perplexity:.3f}", _interval(text.increase, digits=3)]
            row += [_BASE if text.kl is None else f"{text.kl:.4f}"]
        for task in line.tasks.values():
            result = task.result
            metric = result.metrics[result.headline]
            if result.headline in result.per_document:
                row += [f"{100 * metric.value:.2f} ± {100 * metric.stderr:.2f}", _interval(task.difference, digits=2)]
            else:
                row += [f"{metric.value:.4f}"]
        if timed is not None:
            row += [_milliseconds(trial, baseline, name) for name in (TTFT, TPOT)]
        rows.append(row)
    return rows


def notes(lines: Sequence[Line]) -> list[str]:
    """What has to be said under the table: of its times."""
    latencies = [line.trial.latency for line in lines if line.trial.latency is not None]
    if not latencies:
        return []
    runs = sorted({time.runs for latency in latencies for time in latency.times.values()})
    modes = ", ".join(dict.fromkeys(latency.mode for latency in latencies))
    count = f"{runs[0]} to {runs[-1]}" if len(runs) > 1 else str(runs[0])
    found = [f"{TTFT}, {TPOT}: medians of {count} runs, {modes}; in brackets times as fast as {FLOAT}"]
    loaded = [latency.others for latency in latencies if latency.disturbed]
    if loaded:
        known = [share for share in loaded if share is not None]
        what = f"others kept up to {max(known):.0%} of the CPU busy" if known else "it is unknown what others did"
        found.append(f"{_DISTURBED}: NOT TO BE PUBLISHED, {what} meanwhile; at most {MOST:.0%} would do")
    return found


def markdown(lines: Sequence[Line]) -> str:
    """The table in Markdown, and what has to be said under it."""
    rows = cells(lines)
    texts = ["| " + " | ".join(row) + " |" for row in rows]
    said = [f"{note}  " for note in notes(lines)]
    return "\n".join([texts[0], "|" + "---|" * len(rows[0]), *texts[1:], *(["", *said] if said else [])])


def _milliseconds(trial: Trial, baseline: Trial, name: str) -> str:
    if trial.latency is None:
        return _BASE
    time, mark = trial.latency.times[name].median, _DISTURBED if trial.latency.disturbed else ""
    if trial is baseline or baseline.latency is None:
        return f"{time:.3f}{mark}"
    return f"{time:.3f}{mark} ({baseline.latency.times[name].median / time:.2f}x)"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _interval(difference: Difference | None, *, digits: int) -> str:
    """In percent, or in points of percent."""
    if difference is None:
        return _BASE
    mean, low, high = (f"{100 * value:+.{digits}f}" for value in (difference.mean, difference.low, difference.high))
    return f"{mean} % [{low}, {high}]" if digits == 3 else f"{mean} [{low}, {high}]"
