"""What the evaluation of a text or a task gives, as data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quamba.eval.perplexity import Perplexity

# As in the tables of the Mamba and Quamba papers: accuracy by likelihood per byte where the choices differ in length.
_BY_LENGTH = ("hellaswag", "arc_challenge")


@dataclass(frozen=True, eq=False)
class TextResult:
    """The perplexity on a text: of which file, in which windows, how many at once, in how many seconds."""

    name: str
    path: str
    perplexity: Perplexity
    context: int
    stride: int
    batch_size: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without each window's values."""
        return {
            "name": self.name,
            "text": self.path,
            "perplexity": self.perplexity.perplexity,
            "perplexity_stderr": self.perplexity.perplexity * self.perplexity.nll_stderr,
            "nll": self.perplexity.nll,
            "nll_stderr": self.perplexity.nll_stderr,
            "tokens": self.perplexity.tokens,
            "windows": len(self.perplexity.window_tokens),
            "context": self.context,
            "stride": self.stride,
            "batch_size": self.batch_size,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Metric:
    """A figure with its standard error, NaN where lm-eval has none."""

    value: float
    stderr: float


@dataclass(frozen=True)
class TaskResult:
    """What a model scored in a task.

    Attributes:
        name: of the task.
        version: lm-eval's, of the task's definition.
        documents: how many were asked.
        metrics: by lm-eval's names: acc, acc_norm, perplexity, word_perplexity, byte_perplexity, bits_per_byte...
        per_document: for each metric that is a mean, its value for every document, in order.
        batch_size: questions at once.
    """

    name: str
    version: str
    documents: int
    metrics: Mapping[str, Metric]
    per_document: Mapping[str, list[float]]
    batch_size: int

    @property
    def headline(self) -> str:
        """The metric that stands for the task in a table."""
        wanted = ("acc_norm", "acc") if self.name in _BY_LENGTH else ("acc", "word_perplexity")
        return next((name for name in wanted if name in self.metrics), next(iter(self.metrics)))

    def to_dict(self, *, documents: bool = False) -> dict[str, Any]:
        """Plain JSON types; `documents` says whether with each document's values."""
        content: dict[str, Any] = {
            "name": self.name,
            "version": self.version,
            "documents": self.documents,
            "metrics": {
                name: {"value": metric.value, "stderr": None if math.isnan(metric.stderr) else metric.stderr}
                for name, metric in self.metrics.items()
            },
            "batch_size": self.batch_size,
        }
        return content | ({"per_document": {k: list(v) for k, v in self.per_document.items()}} if documents else {})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TaskResult":
        """Inverse of `to_dict(documents=True)`."""
        metrics = {
            name: Metric(metric["value"], math.nan if metric["stderr"] is None else metric["stderr"])
            for name, metric in content["metrics"].items()
        }
        return cls(**{**content, "metrics": metrics})
