"""Perplexity of a model on a token stream, and how far a model's predictions are from another's.

The stream is cut into windows of `context` tokens, which the model reads from a zero state. The first token of the
stream is never predicted; in each window the model is scored on the tokens that no earlier window was scored on and
that have at least one token before them in the window. So with stride = context every window is scored on all its
tokens but the first, and with a smaller stride on its last `stride` tokens (the first window on all but the first).
The last window may be shorter than the others; it counts as long as it has a token to score.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from quamba.errors import QuambaError
from quamba.nn.named import device_of
from quamba.progress import track


@dataclass(frozen=True, eq=False)
class Perplexity:
    """The negative log-likelihood of a stream, in nats.

    Attributes:
        window_nll: float64 (W,), mean over each window's scored tokens.
        window_tokens: int64 (W,), how many those are.
    """

    window_nll: Tensor
    window_tokens: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return int(self.window_tokens.sum())

    @property
    def nll(self) -> float:
        """Mean over all scored tokens."""
        return float((self.window_nll * self.window_tokens).sum()) / self.tokens

    @property
    def nll_stderr(self) -> float:
        """Standard error of nll, from the windows; NaN for a single one."""
        return _weighted_stderr(self.window_nll, self.window_tokens)

    @property
    def perplexity(self) -> float:
        """exp(nll), infinite where that overflows."""
        return float(torch.tensor(self.nll, dtype=torch.float64).exp())


@dataclass(frozen=True, eq=False)
class Comparison:
    """A model beside the reference model, on the same tokens.

    Attributes:
        model, reference: the perplexity of each.
        window_kl: float64 (W,), mean KL(reference || model) of the next-token distributions in each window, in nats.
    """

    model: Perplexity
    reference: Perplexity
    window_kl: Tensor

    @property
    def kl(self) -> float:
        """KL(reference || model), mean over all scored tokens, in nats."""
        return float((self.window_kl * self.model.window_tokens).sum()) / self.model.tokens

    @property
    def nll_difference(self) -> float:
        """Mean nll of the model less that of the reference; about the relative increase of perplexity."""
        return self.model.nll - self.reference.nll

    @property
    def nll_difference_stderr(self) -> float:
        """Standard error of nll_difference, from the paired differences of the windows; NaN for a single window."""
        return _weighted_stderr(self.model.window_nll - self.reference.window_nll, self.model.window_tokens)


@dataclass(frozen=True, eq=False)
class CachedLogits:
    """A model's logits over a stream, kept so that several models can be compared with it.

    Attributes:
        context, stride: of the windows.
        targets: int64, one tensor (n,) a window: the scored tokens.
        logits: one tensor (n, V) a window: the predictions for them.
    """

    context: int
    stride: int
    targets: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    input_ids: Tensor,
    *,
    context: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Perplexity:
    """The perplexity of a causal language model, float or quantized, on a token stream.

    Args:
        model: takes ids (B, L), returns logits (B, L, V) or an object with `logits`.
        input_ids: int64 (T,), on any device.
        context: tokens per window.
        stride: from the start of one window to the next, at most context; None for context (no overlap).
        batch_size: windows per forward pass.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        QuambaError: input_ids, context or stride is malformed, or the model gives NaN.
    """
    windows = _windows(model, input_ids, context=context, stride=stride or context, batch_size=batch_size)
    total = len(_spans(input_ids, context=context, stride=stride or context))
    rows = [_token_nll(logits, targets) for logits, targets in track(windows, "evaluating", total=total, show=progress)]
    return _summary(rows)


@torch.no_grad()
def cache_logits(
    model: nn.Module,
    input_ids: Tensor,
    *,
    context: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
) -> CachedLogits:
    """Keep a model's logits for `compare`: T * V values of `dtype` in CPU memory. Arguments as in `perplexity`."""
    stride = stride or context
    windows = _windows(model, input_ids, context=context, stride=stride, batch_size=batch_size)
    total = len(_spans(input_ids, context=context, stride=stride))
    kept = [
        (targets.cpu(), logits.to("cpu", dtype, copy=True))
        for logits, targets in track(windows, "reference", total=total, show=progress)
    ]
    return CachedLogits(
        context=context,
        stride=stride,
        targets=tuple(targets for targets, _ in kept),
        logits=tuple(logits for _, logits in kept),
    )


@torch.no_grad()
def compare(
    model: nn.Module,
    reference: nn.Module | CachedLogits,
    input_ids: Tensor,
    *,
    context: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Comparison:
    """Evaluate a model beside a reference on the same windows. Arguments as in `perplexity`.

    Args:
        model: the model in question.
        reference: the model it should resemble, or that model's `cache_logits` on the same ids, context and stride.
        input_ids: int64 (T,).
        context, stride, batch_size, progress: as in `perplexity`.

    Raises:
        QuambaError: as in `perplexity`; or the cache is of other windows, or the vocabularies differ.
    """
    stride = stride or context
    mine = _windows(model, input_ids, context=context, stride=stride, batch_size=batch_size)
    total = len(_spans(input_ids, context=context, stride=stride))
    if isinstance(reference, CachedLogits):
        if (reference.context, reference.stride, len(reference.targets)) != (context, stride, total):
            raise QuambaError(
                f"found logits cached with context {reference.context}, stride {reference.stride} and "
                f"{len(reference.targets)} windows; expected {context}, {stride} and {total}"
            )
        theirs: Iterator[tuple[Tensor, Tensor]] = zip(reference.logits, reference.targets, strict=True)
    else:
        theirs = _windows(reference, input_ids, context=context, stride=stride, batch_size=batch_size)
    pairs = track(zip(mine, theirs, strict=True), "comparing", total=total, show=progress)
    rows: list[Tensor] = []
    reference_rows: list[Tensor] = []
    divergences: list[Tensor] = []
    for (logits, targets), (reference_logits, reference_targets) in pairs:
        if logits.shape != reference_logits.shape or not torch.equal(targets.cpu(), reference_targets.cpu()):
            raise QuambaError(
                f"found logits {tuple(logits.shape)} beside {tuple(reference_logits.shape)} of the reference, or of "
                "other tokens; expected the same tokens and the same vocabulary"
            )
        reference_logits = reference_logits.to(logits.device)
        rows.append(_token_nll(logits, targets))
        reference_rows.append(_token_nll(reference_logits, targets))
        ours, other = (F.log_softmax(values.to(torch.float32), dim=-1) for values in (logits, reference_logits))
        divergences.append((other.exp() * (other - ours)).sum(dim=-1).to(torch.float64))
    return Comparison(
        model=_summary(rows),
        reference=_summary(reference_rows),
        window_kl=torch.stack([row.mean() for row in divergences]).cpu(),
    )


def _weighted_stderr(values: Tensor, weights: Tensor) -> float:
    """Of the weighted mean of (W,) independent values; NaN for a single one."""
    count = weights.shape[0]
    if count < 2:
        return math.nan
    share = weights.to(torch.float64) / weights.sum()
    deviation = values - (share * values).sum()
    return math.sqrt(float((share * deviation).square().sum()) * count / (count - 1))


def _token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (n, V), targets (n,) -> float64 (n,); log-softmax in float32."""
    return F.cross_entropy(logits.to(torch.float32), targets, reduction="none").to(torch.float64)


def _summary(rows: list[Tensor]) -> Perplexity:
    nll = torch.stack([row.mean() for row in rows]).cpu()
    if bool(nll.isnan().any()):
        raise QuambaError(
            f"found NaN logits in {int(nll.isnan().sum())} of {len(rows)} windows; expected numbers: check the model"
        )
    return Perplexity(window_nll=nll, window_tokens=torch.tensor([row.shape[0] for row in rows]))


def _spans(input_ids: Tensor, *, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first scored) of each window, as positions in the stream."""
    if input_ids.dim() != 1 or input_ids.is_floating_point() or input_ids.shape[0] < 2:
        raise QuambaError(
            f"found input_ids of shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; "
            "expected one stream of at least 2 token ids, of shape (T,)"
        )
    if context < 2 or not 1 <= stride <= context:
        raise QuambaError(
            f"found context {context} and stride {stride}; expected context >= 2 and 1 <= stride <= context"
        )
    total, scored = input_ids.shape[0], 1
    spans = []
    for begin in range(0, total, stride):
        end = min(begin + context, total)
        first = max(scored, begin + 1)
        if first < end:
            spans.append((begin, end, first))
        scored = max(scored, end)
        if end == total:
            break
    return spans


def _windows(
    model: nn.Module, input_ids: Tensor, *, context: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (n, V), targets (n,)) of each window's scored tokens."""
    spans = _spans(input_ids, context=context, stride=stride)
    device = device_of(model)
    rows = getattr(getattr(model, "config", None), "vocab_size", None)
    if rows is not None and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < rows:
        raise QuambaError(
            f"found token ids from {int(input_ids.min())} to {int(input_ids.max())}; expected 0 to {rows - 1}: "
            "do tokenizer and model belong together?"
        )
    ids = input_ids.to(device=device, dtype=torch.int64)
    full = [span for span in spans if span[1] - span[0] == context]
    batches = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    # Only the last window can be shorter.
    batches += [[span] for span in spans[len(full) :]]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            logits = _logits(model, torch.stack([ids[begin:end] for begin, end, _ in batch]))
            for row, (begin, end, first) in zip(logits, batch, strict=True):
                yield row[first - begin - 1 : end - begin - 1], ids[first:end]
    finally:
        if training:
            model.train()


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids, use_cache=False) if isinstance(model, PreTrainedModel) else model(ids)
    logits = out if isinstance(out, Tensor) else out.logits
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise QuambaError(f"found {type(logits).__name__} for logits; expected a tensor (B, L, V)")
    return logits
