"""Evaluation: what quantization does to a model's predictions."""

from quamba.eval.perplexity import CachedLogits, Comparison, Perplexity, cache_logits, compare, perplexity
from quamba.eval.results import Metric, TaskResult, TextResult
from quamba.eval.tasks import parse_task, run_tasks
from quamba.eval.template import LocalTask, TaskTemplate
from quamba.eval.texts import measure_text

__all__ = [
    "CachedLogits",
    "Comparison",
    "LocalTask",
    "Metric",
    "Perplexity",
    "TaskResult",
    "TaskTemplate",
    "TextResult",
    "cache_logits",
    "compare",
    "measure_text",
    "parse_task",
    "perplexity",
    "run_tasks",
]
