"""Perplexity and comparison against plain loops in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from quamba.errors import QuambaError
from quamba.eval import cache_logits, compare, perplexity

VOCAB = 13


class Sums(nn.Module):
    """Logits that depend on everything read so far: a running sum of one row a token."""

    def __init__(self, seed: int, *, wrapped: bool = False) -> None:
        super().__init__()
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) / 3
        self.table = nn.Parameter(table)
        self.wrapped = wrapped
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.widths: list[int] = []

    def forward(self, ids: Tensor) -> Tensor | SimpleNamespace:
        assert not self.training
        self.widths.append(ids.shape[0])
        logits = self.table[ids].cumsum(dim=1)
        return SimpleNamespace(logits=logits) if self.wrapped else logits


def stream(length: int) -> Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length))


def distributions(model: Sums, ids: list[int], context: int, stride: int) -> list[list[tuple[int, list[float]]]]:
    """Per window: (target, log-probabilities), written as the definition reads."""
    table = model.table.detach().double().tolist()
    scored = {0}
    windows = []
    for begin in range(0, len(ids), stride):
        total = [0.0] * VOCAB
        rows = []
        for position in range(begin, min(begin + context, len(ids)) - 1):
            total = [a + b for a, b in zip(total, table[ids[position]], strict=True)]
            if position + 1 not in scored:
                norm = math.log(math.fsum(math.exp(v) for v in total))
                rows.append((ids[position + 1], [v - norm for v in total]))
        scored |= set(range(begin, min(begin + context, len(ids))))
        if rows:
            windows.append(rows)
        if begin + context >= len(ids):
            break
    return windows


@pytest.mark.parametrize(
    ("length", "context", "stride", "batch_size"),
    [
        (64, 16, None, 2),
        (67, 16, None, 3),  # a shorter last window
        (65, 16, None, 4),  # a last window of one token, which has nothing to predict
        (66, 16, None, 4),  # of two tokens
        (10, 16, None, 8),  # one window, shorter than the context
        (2, 16, None, 1),
        (61, 16, 5, 4),  # overlapping windows
        (61, 16, 15, 1),
        (33, 2, None, 5),
        (33, 7, 1, 5),
    ],
)
def test_perplexity_equals_the_definition(length: int, context: int, stride: int | None, batch_size: int) -> None:
    model, ids = Sums(0, wrapped=True).eval(), stream(length)
    found = perplexity(model, ids, context=context, stride=stride, batch_size=batch_size, progress=False)
    expected = distributions(model, ids.tolist(), context, stride or context)
    nll = [-row[target] for window in expected for target, row in window]
    assert found.tokens == len(nll)
    assert found.window_tokens.tolist() == [len(window) for window in expected]
    assert found.nll == pytest.approx(math.fsum(nll) / len(nll), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(math.fsum(nll) / len(nll)), rel=1e-6)
    for window, value in zip(expected, found.window_nll.tolist(), strict=True):
        assert value == pytest.approx(-math.fsum(row[target] for target, row in window) / len(window), rel=1e-5)
    assert max(model.widths) <= batch_size


def test_overlap_scores_every_token_but_the_first() -> None:
    assert perplexity(Sums(0).eval(), stream(61), context=16, stride=5, progress=False).tokens == 60


def test_mode_is_restored() -> None:
    model = Sums(0).train()
    perplexity(model, stream(40), context=8, progress=False)
    assert model.training


@pytest.mark.parametrize("cached", [False, True])
def test_compare_equals_the_definition(cached: bool) -> None:
    model, reference, ids = Sums(1).eval(), Sums(2, wrapped=True).eval(), stream(75)
    options = {"context": 16, "stride": 11, "batch_size": 3, "progress": False}
    other = cache_logits(reference, ids, **options) if cached else reference
    found = compare(model, other, ids, **options)
    ours, theirs = (distributions(m, ids.tolist(), 16, 11) for m in (model, reference))
    divergences, differences = [], []
    for mine, its in zip(ours, theirs, strict=True):
        for (target, q), (_, p) in zip(mine, its, strict=True):
            divergences.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            differences.append(p[target] - q[target])
    assert found.kl == pytest.approx(math.fsum(divergences) / len(divergences), rel=1e-5)
    assert found.nll_difference == pytest.approx(math.fsum(differences) / len(differences), rel=1e-4, abs=1e-6)
    assert found.model.perplexity == perplexity(model, ids, **options).perplexity
    assert found.reference.perplexity == perplexity(reference, ids, **options).perplexity


def test_standard_error_of_equal_windows_is_the_textbook_one() -> None:
    model, reference, ids = Sums(1).eval(), Sums(2).eval(), stream(80)
    found = compare(model, reference, ids, context=16, progress=False)
    difference = found.model.window_nll - found.reference.window_nll
    assert found.nll_difference_stderr == pytest.approx(float(difference.std(unbiased=True)) / math.sqrt(5), rel=1e-9)
    assert math.isnan(compare(model, reference, ids[:16], context=16, progress=False).nll_difference_stderr)


def test_a_model_has_no_divergence_from_itself() -> None:
    model, ids = Sums(1).eval(), stream(50)
    found = compare(model, Sums(1).eval(), ids, context=16, progress=False)
    assert (found.kl, found.nll_difference, found.nll_difference_stderr) == (0.0, 0.0, 0.0)


def test_half_precision_cache_is_close() -> None:
    model, reference, ids = Sums(1).eval(), Sums(2).eval(), stream(75)
    cache = cache_logits(reference, ids, context=16, dtype=torch.bfloat16, progress=False)
    assert cache.logits[0].dtype == torch.bfloat16
    exact = compare(model, reference, ids, context=16, progress=False)
    assert compare(model, cache, ids, context=16, progress=False).kl == pytest.approx(exact.kl, rel=0.02)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (stream(40)[None], {}, "shape \\(1, 40\\)"),
        (stream(40).float(), {}, "torch.float32"),
        (stream(1), {}, "at least 2 token ids"),
        (stream(40), {"context": 1}, "context 1"),
        (stream(40), {"context": 8, "stride": 9}, "stride 9"),
        (stream(40), {"context": 8, "stride": -1}, "stride -1"),
        (stream(40) + 1, {"context": 8}, "expected 0 to 12"),
        (stream(40) - 1, {"context": 8}, "from -1"),
    ],
)
def test_malformed_input_raises(ids: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(QuambaError, match=message):
        perplexity(Sums(0).eval(), ids, progress=False, **options)


def test_nan_raises() -> None:
    model = Sums(0).eval()
    with torch.no_grad():
        model.table[3] = math.nan
    with pytest.raises(QuambaError, match="NaN logits"):
        perplexity(model, stream(40), context=8, progress=False)


def test_infinite_nll_is_an_infinite_perplexity() -> None:
    model = Sums(0).eval()
    with torch.no_grad():
        model.table[:, 5] = -1e6
    assert perplexity(model, torch.tensor([1, 5, 5]), context=8, progress=False).perplexity == math.inf


def test_compare_refuses_another_cache_and_another_vocabulary() -> None:
    model, ids = Sums(1).eval(), stream(64)
    cache = cache_logits(model, ids, context=16, progress=False)
    with pytest.raises(QuambaError, match="cached with context 16"):
        compare(model, cache, ids, context=8, progress=False)
    with pytest.raises(QuambaError, match="same tokens"):
        compare(model, cache, ids.flip(0), context=16, progress=False)
    narrow = Sums(1).eval()
    narrow.table = nn.Parameter(narrow.table[:, :5].detach())
    with pytest.raises(QuambaError, match="same vocabulary"):
        compare(narrow, cache, ids, context=16, progress=False)
