"""Running a comparison: each recipe on a fresh copy of the model, measured on the same texts and tasks.

Of the float model's predictions only each window's negative log-likelihood is kept, and, for the divergence, the
logits of a sample of windows.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from quamba.checkpoint.sizes import checkpoint_dtype, weight_bytes
from quamba.errors import QuambaError
from quamba.eval import provenance
from quamba.eval.latency import measure_latency
from quamba.eval.perplexity import CachedLogits, cache_logits, compare
from quamba.eval.tasks import run_tasks
from quamba.eval.texts import first_windows, fitting_perplexity
from quamba.eval.trials import FLOAT, Plan, TextTrial, Trial
from quamba.models import find_adapter
from quamba.quantize import quantize
from quamba.recipe import Recipe
from quamba.recipes import get_recipe
from quamba.text import TextPart, calibration_sequences, windows

# Memory for the baseline's logits of the windows on which the divergence is measured.
KL_BYTES = 1 << 28


def run_trials(
    plan: Plan,
    load: Callable[[], Any],
    tokenizer: Any,
    *,
    done: Sequence[Trial] = (),
    keep: Callable[[Trial], None] = lambda trial: None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> list[Trial]:
    """Measure the baseline and every recipe; first come those that are done.

    Args:
        plan: what to compare.
        load: makes a fresh float model, in the dtype and on the device to measure on.
        tokenizer: of the model.
        done: trials of an earlier run of the same plan on the same model; they are not run again.
        keep: called with each new trial as it is finished.
        batch_size: sequences per forward pass; None finds what memory holds.
        progress: show progress bars; None shows them on a terminal.

    Raises:
        QuambaError: from reading, quantizing or evaluating; what was kept by then is not lost. Or there are several
            processes, of which each would see a part of the tasks.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise QuambaError(
            f"found {os.environ['WORLD_SIZE']} processes; expected one: compare without accelerate launch"
        )
    model = load()
    adapter = find_adapter(model)
    pairs = plan.pairs(list(adapter.layers(model)))
    dtype = checkpoint_dtype(model)
    streams = {
        part.name: first_windows(part.ids(tokenizer), count=plan.limit, context=plan.context, stride=plan.context)
        for part in plan.texts
    }
    finished = {trial.key: trial for trial in done}
    measure = _Measure(plan, tokenizer, streams, batch_size=batch_size, progress=progress)
    missing = [pair for pair in pairs if (pair[0].name, _name(pair[1])) not in finished]
    baseline = get_recipe(FLOAT)
    order = [(FLOAT, None), *((recipe.name, _name(text)) for recipe, text in pairs)]
    if missing or (FLOAT, None) not in finished:
        size = weight_bytes(model, dtype=dtype)
        quantize(model, None, baseline, progress=progress)
        if (FLOAT, None) not in finished:
            finished[FLOAT, None] = measure(model, baseline, None, size=size, seconds=0.0, references={})
            keep(finished[FLOAT, None])
    references = measure.references(model) if missing else {}
    for recipe, text in missing:
        del model
        model = load()
        sequences = None if text is None else _calibration(text, tokenizer, plan)
        start = time.perf_counter()
        quantize(model, sequences, recipe, samples=None, percentile=plan.percentile, keep=plan.keep, progress=progress)
        seconds, size = time.perf_counter() - start, weight_bytes(model, dtype=dtype)
        trial = measure(model, recipe, text, size=size, seconds=seconds, references=references)
        finished[trial.key] = trial
        keep(trial)
    return [finished[key] for key in order]


class _Measure:
    """One model after the other, on the same texts and tasks."""

    def __init__(
        self,
        plan: Plan,
        tokenizer: Any,
        streams: Mapping[str, Tensor],
        *,
        batch_size: int | None,
        progress: bool | None,
    ) -> None:
        self.plan, self.tokenizer, self.streams = plan, tokenizer, streams
        self.batch_size, self.progress = batch_size, progress

    def __call__(
        self,
        model: nn.Module,
        recipe: Recipe,
        text: TextPart | None,
        *,
        size: int,
        seconds: float,
        references: Mapping[str, CachedLogits],
    ) -> Trial:
        tasks = (
            run_tasks(
                model, self.tokenizer, self.plan.tasks, batch_size=self.batch_size, limit=self.plan.limit,
                progress=self.progress,
            )
            if self.plan.tasks
            else []
        )  # fmt: skip
        timed = None if recipe.simulated else self.plan.latency
        return Trial(
            recipe=recipe.to_dict(),
            calibration=_name(text),
            bytes=size,
            seconds=seconds,
            texts={name: self._text(model, name, references.get(name)) for name in self.streams},
            tasks={result.name: result for result in tasks},
            latency=None if timed is None else measure_latency(model, timed),
            date=provenance.now(),
        )

    def references(self, model: nn.Module) -> dict[str, CachedLogits]:
        """The baseline's logits of the sampled windows."""
        return {
            name: cache_logits(model, self._sample(model, ids), **self._windows) for name, ids in self.streams.items()
        }

    def _text(self, model: nn.Module, name: str, reference: CachedLogits | None) -> TextTrial:
        ids = self.streams[name]
        found, _ = fitting_perplexity(
            model, ids, context=self.plan.context, batch_size=self.batch_size, progress=self.progress
        )
        nll, tokens = found.window_nll.tolist(), found.window_tokens.tolist()
        if not all(map(math.isfinite, nll)):
            raise QuambaError(f"found an infinite likelihood on text {name!r}; expected finite ones")
        if reference is None:
            return TextTrial(nll, tokens)
        beside = compare(model, reference, self._sample(model, ids), **self._windows)
        return TextTrial(nll, tokens, beside.kl, beside.model.tokens)

    @property
    def _windows(self) -> dict[str, Any]:
        return {"context": self.plan.context, "batch_size": self.batch_size or 8, "progress": self.progress}

    def _sample(self, model: Any, ids: Tensor) -> Tensor:
        """Windows spread over the text, as many as the memory for their logits allows."""
        context = self.plan.context
        if ids.shape[0] <= context:
            return ids
        rows = int(model.config.vocab_size)
        return windows(ids, length=context, count=max(1, KL_BYTES // (4 * rows * context))).flatten()


def _name(text: TextPart | None) -> str | None:
    return None if text is None else text.name


def _calibration(text: TextPart, tokenizer: Any, plan: Plan) -> list[Tensor]:
    if text.whole:
        return calibration_sequences(text.path, tokenizer, length=plan.seq_len, count=plan.samples)
    return list(windows(text.ids(tokenizer), length=plan.seq_len, count=plan.samples))
