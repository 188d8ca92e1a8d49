"""What a comparison of recipes is, and what it has found: data with a JSON round trip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quamba.calibration import static_plan
from quamba.errors import CalibrationError, QuambaError, RecipeError
from quamba.eval.latency import Latency, LatencySettings
from quamba.eval.provenance import file_sha256
from quamba.eval.results import TaskResult
from quamba.eval.template import LocalTask
from quamba.recipe import Recipe
from quamba.smoothing import smoothing_plan
from quamba.text import TextPart

# The baseline's recipe: the original model, computed by quamba's float mixers.
FLOAT = "float"


@dataclass(frozen=True)
class Plan:
    """What is compared, and on what.

    Attributes:
        recipes: beside the baseline, in order.
        calibrations: texts, each of which every recipe with static scales is calibrated on.
        texts, tasks: to measure on.
        samples, seq_len: of the calibration: sequences, and tokens in each.
        context: tokens per window of a text.
        limit: only the first so many windows of a text and documents of a task.
        percentile, keep: as in quantize().
        latency: what to time of every recipe but those that simulate their bits; None for nothing.
    """

    recipes: tuple[Recipe, ...]
    calibrations: tuple[TextPart, ...] = ()
    texts: tuple[TextPart, ...] = ()
    tasks: tuple[str | LocalTask, ...] = ()
    samples: int = 128
    seq_len: int = 512
    context: int = 512
    limit: int | None = None
    percentile: float | str | None = None
    keep: tuple[str, ...] = ()
    latency: LatencySettings | None = None

    def __post_init__(self) -> None:
        names = [recipe.name for recipe in self.recipes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RecipeError(f"found two recipes named {twice[0]!r}; expected a name of its own for each")
        if not self.texts and not self.tasks:
            raise QuambaError("found neither a text nor a task to compare on; expected at least one")

    def pairs(self, layers: Sequence[int]) -> list[tuple[Recipe, TextPart | None]]:
        """Each recipe with each calibration that it depends on, the baseline left out.

        Raises:
            CalibrationError: a recipe needs a calibration and there is none.
        """
        found: list[tuple[Recipe, TextPart | None]] = []
        for recipe in self.recipes:
            calibrated = bool(static_plan(recipe, layers)) or bool(smoothing_plan(recipe, layers))
            if calibrated and not self.calibrations:
                raise CalibrationError(f"found no calibration text for recipe {recipe.name!r}; expected one: --calib")
            if recipe.name != FLOAT:
                found += [(recipe, text) for text in self.calibrations] if calibrated else [(recipe, None)]
        return found

    def identity(self) -> dict[str, Any]:
        """Everything that the figures of one recipe depend on, but the model and the recipe itself: JSON types."""
        return {
            "calibrations": [_identity(part) for part in self.calibrations],
            "texts": [_identity(part) for part in self.texts],
            "tasks": [task if isinstance(task, str) else _task_identity(task) for task in self.tasks],
            "samples": self.samples,
            "seq_len": self.seq_len,
            "context": self.context,
            "limit": self.limit,
            "percentile": self.percentile,
            "keep": list(self.keep),
            **({} if self.latency is None else {"latency": self.latency.to_dict()}),
        }


@dataclass(frozen=True)
class TextTrial:
    """Negative log-likelihoods on a text, in nats.

    Attributes:
        window_nll: mean over each window's scored tokens.
        window_tokens: how many those are.
        kl: KL(float || this), mean over kl_tokens tokens; None for the baseline.
    """

    window_nll: list[float]
    window_tokens: list[int]
    kl: float | None = None
    kl_tokens: int = 0


@dataclass(frozen=True)
class Trial:
    """What one recipe with one calibration came to.

    Attributes:
        recipe: as data; its name is "float" for the baseline.
        calibration: the name of the text, None where none was needed.
        bytes: of the weights in a checkpoint, in the dtype of the original's.
        seconds: that quantize() took.
        texts: by name.
        tasks: by name.
        latency: how long its tokens take; None where that was not measured, and for a simulation.
        date: when it was done, in UTC.
    """

    recipe: dict[str, Any]
    calibration: str | None
    bytes: int
    seconds: float
    texts: dict[str, TextTrial] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    latency: Latency | None = None
    date: str = ""

    @property
    def name(self) -> str:
        """Of the recipe."""
        return str(self.recipe["name"])

    @property
    def simulated(self) -> bool:
        """True where the recipe's fewer bits were simulated in float: then `bytes` says nothing of the format."""
        return Recipe.from_dict(self.recipe).simulated

    @property
    def key(self) -> tuple[str, str | None]:
        """What tells it from the others of a comparison."""
        return self.name, self.calibration

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with each window's and document's values."""
        return {
            **vars(self),
            "texts": {name: vars(text) for name, text in self.texts.items()},
            "tasks": {name: result.to_dict(documents=True) for name, result in self.tasks.items()},
            "latency": None if self.latency is None else self.latency.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Trial":
        """Inverse of `to_dict`. Raises KeyError or TypeError on anything else."""
        texts = {name: TextTrial(**text) for name, text in content["texts"].items()}
        tasks = {name: TaskResult.from_dict(result) for name, result in content["tasks"].items()}
        latency = None if content["latency"] is None else Latency.from_dict(content["latency"])
        return cls(**{**content, "texts": texts, "tasks": tasks, "latency": latency})


def _identity(part: TextPart) -> dict[str, Any]:
    path = Path(part.path)
    return {**vars(part), "path": path.name, "sha256": file_sha256(path) if path.is_file() else part.path}


def _task_identity(task: LocalTask) -> dict[str, Any]:
    return {**task.template.to_dict(), "sha256": [file_sha256(file) for file in task.files()]}
